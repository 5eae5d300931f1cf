# Gluon functions run in a compiler whose values, calls and constants a type checker does not know.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none, reportCallIssue=none
# pyright: reportArgumentType=none, reportAssignmentType=none, reportAttributeAccessIssue=none
# pyright: reportOptionalMemberAccess=none, reportIndexIssue=none, reportOperatorIssue=none
"""Kernels that start before the one in front of them has ended (programmatic dependent launch).

A kernel that was launched with `OVERLAP` waits in every program, before it reads what the one in
front of it writes and before any return: what follows may wait for this kernel alone.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

OVERLAP: dict[str, Any] = {"launch_pdl": True}  # among the options of a launch
_WAIT = tl.constexpr("griddepcontrol.wait; // $0")
_RELEASE = tl.constexpr("griddepcontrol.launch_dependents; // $0")


@triton.jit
def wait_for_predecessor():
    """Until all that it wrote can be read."""
    tl.inline_asm_elementwise(_WAIT, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def release_successor():
    """The next kernel may start when all programs have come here."""
    tl.inline_asm_elementwise(_RELEASE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def gluon_wait_for_predecessor():
    """`wait_for_predecessor` of a kernel in Gluon; at once where the launch has no OVERLAP."""
    gl.inline_asm_elementwise(_WAIT, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def gluon_release_successor():
    """`release_successor` of a kernel in Gluon."""
    gl.inline_asm_elementwise(_RELEASE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
