"""The FP8 operators as PyTorch sees them, whichever backend runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.fp8_linear.choice import MATMUL, QUANTIZE

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _quantizer(backend: str) -> Any:
    return QUANTIZE.load("triton" if backend == "scaled_mm" else backend)


@torch.library.custom_op("model1::fp8_quantize", mutates_args=())
def _quantize(
    x: Tensor, kind: str, power_of_two: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _quantizer(backend)(x, kind=kind, power_of_two=power_of_two)


@torch.library.custom_op("model1::fp8_matmul", mutates_args=())
def _matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, b_is_blocks: bool, out: str,
    backend: str,
) -> Tensor:  # fmt: skip
    run = MATMUL.load(backend)
    return run(a, a_scale, b, b_scale, b_is_blocks=b_is_blocks, out_dtype=_DTYPES[out])


@torch.library.custom_op("model1::fp8_linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor | None,
    w_fp8: Tensor,
    w_scale: Tensor,
    w_fp8_t: Tensor,
    w_scale_t: Tensor,
    power_of_two: bool,
    keep_columns: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    # weight: what the gradient is of and like; its numbers are in w_fp8
    kind = "both" if keep_columns else "rows"
    x_fp8, x_scale, *columns = _quantizer(backend)(x, kind=kind, power_of_two=power_of_two)
    out = MATMUL.load(backend)(
        x_fp8, x_scale, w_fp8, w_scale, b_is_blocks=True, out_dtype=x.dtype
    )  # fmt: skip
    return _first_rows(out, x.shape[0]), columns[0], columns[1]


@torch.library.custom_op("model1::fp8_linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    weight: Tensor | None,
    x_fp8_t: Tensor,
    x_scale_t: Tensor,
    w_fp8_t: Tensor,
    w_scale_t: Tensor,
    needs_x: bool,
    needs_weight: bool,
    power_of_two: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kind = "both" if needs_weight else "rows"
    g_fp8, g_scale, g_fp8_t, g_scale_t = _quantizer(backend)(
        grad.contiguous(), kind=kind, power_of_two=power_of_two
    )
    multiply = MATMUL.load(backend)
    d_x, d_weight = grad.new_empty(0), grad.new_empty(0)
    if needs_x:
        d_x = multiply(
            g_fp8, g_scale, w_fp8_t, w_scale_t, b_is_blocks=True, out_dtype=grad.dtype
        )  # fmt: skip
        d_x = _first_rows(d_x, grad.shape[0])
    if needs_weight:
        assert weight is not None
        d_weight = multiply(
            g_fp8_t, g_scale_t, x_fp8_t, x_scale_t, b_is_blocks=False, out_dtype=weight.dtype
        )  # fmt: skip
    return d_x, d_weight


def _first_rows(out: Tensor, t: int) -> Tensor:
    """Without the rows that fill up 16, in memory of its own."""
    return out if out.shape[0] == t else out[:t].clone()


@_quantize.register_fake
def _(x: Tensor, kind: str, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    t, c = x.shape
    rows, columns = -(-t // 16) * 16, -(-t // 128) * 128
    shapes: tuple[tuple[int, ...], ...]
    if kind == "blocks":
        blocks = (-(-t // 128), -(-c // 512) * 4), (-(-c // 128), -(-t // 512) * 4)
        shapes = ((t, c), blocks[0], (c, t), blocks[1])
    elif kind == "both":
        shapes = ((rows, c), (-(-c // 128), rows), (c, columns), (columns // 128, c))
    else:
        shapes = ((rows, c), (-(-c // 128), rows), (0,), (0,))
    codes, scales = torch.float8_e4m3fn, torch.float32
    first, second, third, fourth = (
        x.new_empty(shape, dtype=dtype)
        for shape, dtype in zip(shapes, (codes, scales) * 2, strict=True)
    )
    return first, second, third, fourth


@_matmul.register_fake
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *args: Any) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=_DTYPES[args[1]])


@_linear.register_fake
def _(x: Tensor, weight: Tensor | None, w_fp8: Tensor, *args: Any) -> tuple[Tensor, ...]:
    t, c = x.shape
    columns = -(-t // 128) * 128
    keep = args[4]
    return (
        x.new_empty(t, w_fp8.shape[0]),
        x.new_empty((c, columns) if keep else (0,), dtype=torch.float8_e4m3fn),
        x.new_empty((columns // 128, c) if keep else (0,), dtype=torch.float32),
    )


@_linear_backward.register_fake
def _(grad: Tensor, weight: Tensor | None, *args: Any) -> tuple[Tensor, Tensor]:
    needs_x, needs_weight = args[4:6]
    d_x = grad.new_empty((grad.shape[0], args[2].shape[0]) if needs_x else (0,))
    d_weight = grad.new_empty(0)
    if needs_weight:
        assert weight is not None
        d_weight = weight.new_empty(weight.shape)
    return d_x, d_weight


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, _, w_fp8_t, w_scale_t, ctx.power_of_two, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(weight, *output[1:], w_fp8_t, w_scale_t)


def _back_through_linear(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    weight, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    run = torch.ops.model1.fp8_linear_backward
    d_x, d_weight = run(grad, weight, *saved, *needs, ctx.power_of_two, ctx.backend)
    return d_x if needs[0] else None, d_weight if needs[1] else None, *[None] * 7


_linear.register_autograd(_back_through_linear, setup_context=_save_linear)
