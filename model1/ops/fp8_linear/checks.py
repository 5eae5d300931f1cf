"""What the block-scaled FP8 operators accept; the kernels trust it."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_FORMATS = ("ue8m0", "fp32")
PRECISIONS = ("fp8", "bf16")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_matrix(name: str, x: Tensor) -> None:
    """The same for a matrix to quantise, wherever its numbers lie."""
    if x.dim() != 2 or 0 in x.shape[1:] or x.dtype not in _DTYPES:
        rule = f"{name} must be [t, c], c > 0, in bfloat16, float16 or float32"
        raise ValueError(f"{rule}, got {list(x.shape)} {x.dtype}")


def check_input(x: Tensor) -> None:
    """The same for what `fp8_linear` maps."""
    if x.dim() < 1 or x.dtype not in _DTYPES:
        rule = "x must be [..., c] in bfloat16, float16 or float32"
        raise ValueError(f"{rule}, got {list(x.shape)} {x.dtype}")


def check_weight(x: Tensor, weight: Tensor, quantized: tuple[Tensor, ...] | None) -> None:
    """The same for the weight of `fp8_linear`, which may come quantised as well."""
    check_matrix("weight", weight)
    if quantized is not None and quantized[0].shape != weight.shape:
        got = f"{list(weight.shape)} and {list(quantized[0].shape)}"
        raise ValueError(f"weight and quantized.w_fp8 must have one shape, got {got}")
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [o, {x.shape[-1]}], got {list(weight.shape)}")
    check_device("weight", weight, x)


def check_quantized(x: Tensor, codes: tuple[Tensor, ...]) -> None:
    """The same for a weight that is quantised already."""
    w_fp8, w_scale, w_fp8_t, w_scale_t = codes
    if w_fp8.dim() != 2 or w_fp8.shape[1] != x.shape[-1]:
        raise ValueError(f"w_fp8 must be [o, {x.shape[-1]}], got {list(w_fp8.shape)}")
    o, c = w_fp8.shape
    _check_blocks("w_fp8", w_fp8, "w_scale", w_scale, (o, c))
    _check_blocks("w_fp8_t", w_fp8_t, "w_scale_t", w_scale_t, (c, o))
    for name, tensor in zip(("w_fp8", "w_scale", "w_fp8_t", "w_scale_t"), codes, strict=True):
        check_device(name, tensor, x)


def check_scaled_mm(c: int, o: int) -> None:
    """The same for sizes that PyTorch's product does not take."""
    if c % 16 or o % 16:
        raise ValueError(f"backend scaled_mm needs multiples of 16, got c = {c} and o = {o}")


def check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """The same for a tensor elsewhere than x."""
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_blocks(
    name: str, codes: Tensor, scale_name: str, scale: Tensor, shape: tuple[int, int]
) -> None:
    if codes.shape != shape or codes.dtype != torch.float8_e4m3fn or not codes.is_contiguous():
        rule = f"{name} must be {list(shape)} float8_e4m3fn, contiguous"
        raise ValueError(f"{rule}, got {list(codes.shape)} {codes.dtype}, {codes.stride()}")
    blocks = (-(-shape[0] // 128), -(-shape[1] // 512) * 4)
    if scale.shape != blocks or scale.dtype != torch.float32 or not scale.is_contiguous():
        rule = f"{scale_name} must be {list(blocks)} float32, contiguous"
        raise ValueError(f"{rule}, got {list(scale.shape)} {scale.dtype}, {scale.stride()}")
