"""What the cross-entropy of a linear map accepts; the kernels trust it."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import KERNEL_DTYPES

IGNORE = -100  # target that is not to be learned; the default of F.cross_entropy


def usable(backend: str, hidden: Tensor) -> str:
    """`backend`, or "ref" for "auto" where a GPU's kernels do not take the dtype."""
    is_refused = backend == "auto" and hidden.is_cuda and hidden.dtype not in KERNEL_DTYPES
    return "ref" if is_refused else backend


def check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int) -> None:
    """Raise ValueError for the first argument that breaks the contract, dtypes left out."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden must be [n, c], got {list(hidden.shape)}")
    n, c = hidden.shape
    if weight.dim() != 2 or weight.shape[1] != c or len(weight) == 0:
        raise ValueError(f"weight must be [vocab, {c}], vocab > 0, got {list(weight.shape)}")
    if targets.shape != (n,) or targets.dtype != torch.int64:
        got = f"{list(targets.shape)} {targets.dtype}"
        raise ValueError(f"targets must be [{n}] int64, got {got}")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            rule = f"must be on hidden's device {hidden.device}, got {tensor.device}"
            raise ValueError(f"{name} {rule}")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(targets, len(weight))


def check_dtypes(backend: str, hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError for dtypes that this concrete backend does not take."""
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point, got {hidden.dtype}")
    if backend == "triton" and hidden.dtype not in KERNEL_DTYPES:
        rule = "must be bfloat16, float16 or float32 for triton"
        raise ValueError(f"hidden {rule}, got {hidden.dtype}")
    if weight.dtype not in (hidden.dtype, torch.float32):
        rule = f"must be float32 or {hidden.dtype} like hidden"
        raise ValueError(f"weight {rule}, got {weight.dtype}")


def _check_range(targets: Tensor, vocab: int) -> None:
    wrong = (targets != IGNORE) & ((targets < 0) | (targets >= vocab))
    if wrong.any():
        row = int(wrong.nonzero()[0, 0])
        rule = f"must be {IGNORE} or in [0, {vocab})"
        raise ValueError(f"targets {rule}, got {int(targets[row])} in row {row}")
