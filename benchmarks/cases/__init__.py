"""What is measured: one module per operator.

A module has OPERATOR, the name for `--operator`; TESTS, globs of the test files that must pass
before anything is timed; and `cases()`. A new operator is a new module and a line in MODULES.
"""

from __future__ import annotations

from types import ModuleType

from benchmarks.cases import (
    cross_entropy,
    dense_decode,
    engram,
    fp8_linear,
    kv_write,
    mha_prefill,
    mhc,
    moe,
    selector,
    small_ops,
    sparse_decode,
    sparse_prefill,
)
from benchmarks.cases.case import Call, Case, Work, own_work

MODULES: tuple[ModuleType, ...] = (
    sparse_decode, sparse_prefill, dense_decode, kv_write, mha_prefill, mhc, selector, engram,
    fp8_linear, moe, small_ops, cross_entropy,
)  # fmt: skip

__all__ = ["MODULES", "Call", "Case", "Work", "own_work"]
