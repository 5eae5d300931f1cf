"""Rows of a stored table, read and de-quantised: the operator behind `RowStore.gather`."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.engram.checks import check_for_kernel
from model1.ops.engram.formats import engram_gather_ref

ENGRAM_GATHER = Operator(
    name="engram_gather",
    implementations={
        "ref": "model1.ops.engram.formats:engram_gather_ref",
        "triton": "model1.ops.engram.portable_rows:engram_gather_triton",
    },
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_rows(
    data: Tensor,
    scale: Tensor | None,
    rows: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Rows in dtype, computed in fp32 and rounded once: [num_wanted, dim].

    data, scale: those of one `RowStore`, whose dtypes tell its kind. rows: [num_wanted] int64.
    dtype: float32, bfloat16 or float16. Offsets are computed in 64 bits: a table may have any size.
    A row outside the table is an IndexError on the CPU; kernels read it as NaN and touch no
    memory for it; the reference on a GPU leaves it to PyTorch.
    Raises ValueError for dtype, and for a kernel for devices and channels that are not
    contiguous; BackendUnavailable for a backend that cannot run here. Not differentiable.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    name = ENGRAM_GATHER.resolve(backend, data.device)
    if name == "ref":
        return engram_gather_ref(data, scale, rows, dtype)
    check_for_kernel(data.device, is_floating=False, scale=scale, rows=rows)
    for what, tensor in (("data", data), ("scale", scale)):
        if tensor is not None and tensor.stride(1) != 1:  # to copy it would be to copy the table
            raise ValueError(f"{what} must have contiguous rows, got strides {tensor.stride()}")
    return torch.ops.model1.engram_gather(data, scale, rows, dtype, name)


@torch.library.custom_op("model1::engram_gather", mutates_args=())
def _engram_gather(
    data: Tensor, scale: Tensor | None, rows: Tensor, dtype: torch.dtype, backend: str
) -> Tensor:
    return ENGRAM_GATHER.load(backend)(data, scale, rows, dtype)


@_engram_gather.register_fake
def _(data: Tensor, scale: Tensor | None, rows: Tensor, dtype: torch.dtype, backend: str) -> Tensor:
    dim = data.shape[1] * (2 if data.dtype == torch.uint8 else 1)
    return data.new_empty((rows.shape[0], dim), dtype=dtype)
