"""Rotary position embedding on adjacent pairs, its inverse, and YaRN frequencies.

Pairs are interleaved (0,1), (2,3), ...: the layout of MLA and MODEL1 (V3.2's indexer differs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly, unless_fused
from model1.ops.rope.angles import Rotation, rope_frequencies, rotation, yarn_frequencies
from model1.ops.rope.checks import check_tail
from model1.ops.rope.ref import rotate_tail_ref, turn

__all__ = [
    "Rotation",
    "apply_rope",
    "norm_rotate_tail",
    "rope_frequencies",
    "rotate_tail",
    "rotation",
    "yarn_frequencies",
]


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.rope.ref:{name}_ref",
            "triton": f"model1.ops.rope.portable:{name}_triton",
        },
    )


ROTATE_TAIL = _operator("rotate_tail")
NORM_ROTATE_TAIL_BACKWARD = _operator("norm_rotate_tail_backward")


def apply_rope(
    x: Tensor, angles: Rotation, *, inverse: bool = False, backend: str = "auto"
) -> Tensor:
    """Rotate [t, d_rope] or [t, h, d_rope] by the angle of each position; `inverse` turns back.

    Computed in fp32, returned in the dtype of x. Backends, errors and the rest as in `rotate_tail`.
    """
    name = ROTATE_TAIL.resolve(unless_fused(backend, x), x.device)
    if calls_ref_directly(name):
        return turn(x, angles, inverse=inverse)
    check_tail(x, angles, name)
    if name == "ref":
        return turn(x, angles, inverse=inverse)
    return torch.ops.model1.rotate_tail(x, *angles, inverse, None, name)


def rotate_tail(
    x: Tensor, angles: Rotation, *, inverse: bool = False, backend: str = "auto"
) -> Tensor:
    """x [t, d] or [t, h, d] with its last d_rope channels rotated as `apply_rope` does.

    angles: cos, sin [t, d_rope] fp32. The caller gives x up: where no gradient is recorded, its
    memory may hold the result. Differentiable in x. Kernels take bf16, fp16 and fp32, wherever
    tokens and heads lie; "auto" is the reference for others and under torch.compile, which fuses
    it. Raises ValueError for shapes, dtypes and devices (on a CPU not where no gradient is
    recorded), BackendUnavailable for a backend that cannot run here.
    """
    return _rotate(x, angles, inverse, None, backend)


def norm_rotate_tail(
    x: Tensor, angles: Rotation, *, norm_eps: float, inverse: bool = False, backend: str = "auto"
) -> Tensor:
    """`rotate_tail` of x / sqrt(mean(x**2, last axis) + norm_eps), in one pass.

    Kernels round once, at the end, the reference after the norm as well. A head of a kernel's
    result depends on its own channels and angles, and in its last bits on how many heads a token
    has and how they are aligned in memory: not on the tokens, nor on their number. Differentiable
    in x, with kernels once. Backends, errors and the rest as in `rotate_tail`.
    """
    return _rotate(x, angles, inverse, norm_eps, backend)


def _rotate(
    x: Tensor, angles: Rotation, inverse: bool, norm_eps: float | None, backend: str
) -> Tensor:
    name = ROTATE_TAIL.resolve(unless_fused(backend, x), x.device)
    if calls_ref_directly(name):
        return rotate_tail_ref(x, angles, inverse=inverse, norm_eps=norm_eps)
    check_tail(x, angles, name)
    if name == "ref":
        return rotate_tail_ref(x, angles, inverse=inverse, norm_eps=norm_eps)
    return torch.ops.model1.rotate_tail(x, *angles, inverse, norm_eps, name)


@torch.library.custom_op("model1::rotate_tail", mutates_args=())
def _rotate_tail(
    x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, norm_eps: float | None, backend: str
) -> Tensor:
    run = ROTATE_TAIL.load(backend)
    # a plug-in may take the reference, which may write over what it is given
    x = x if backend == "triton" or norm_eps is not None else x.clone()
    return run(x, Rotation(cos, sin), inverse=inverse, norm_eps=norm_eps)


@torch.library.custom_op("model1::norm_rotate_tail_backward", mutates_args=())
def _norm_rotate_tail_backward(
    grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, norm_eps: float, backend: str
) -> Tensor:
    run = NORM_ROTATE_TAIL_BACKWARD.load(backend)
    return run(grad, x, Rotation(cos, sin), inverse=inverse, norm_eps=norm_eps)


_rotate_tail.register_fake(lambda x, *args: x.new_empty(x.shape))
_norm_rotate_tail_backward.register_fake(lambda grad, x, *args: x.new_empty(x.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, *ctx.fields = inputs
    ctx.save_for_backward(None if ctx.fields[1] is None else x, cos, sin)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *angles = ctx.saved_tensors
    inverse, norm_eps, backend = ctx.fields
    if norm_eps is None:
        d_x = torch.ops.model1.rotate_tail(grad, *angles, not inverse, None, backend)
    else:
        run = torch.ops.model1.norm_rotate_tail_backward
        d_x = run(grad, x, *angles, inverse, norm_eps, backend)
    return d_x, None, None, None, None, None


_rotate_tail.register_autograd(_backward, setup_context=_setup_context)
