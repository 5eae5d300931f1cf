"""Training of a table: gradients of the rows that a step read, and Adam on those rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator
from model1.ops.engram.checks import check_for_kernel, check_int64, check_shape

_FLOATS = (torch.float32, torch.bfloat16)


def _operator(name: str) -> Operator:
    return Operator(
        name=name,
        implementations={
            "ref": f"model1.ops.engram.ref_train:{name}_ref",
            "triton": f"model1.ops.engram.portable_train:{name}_triton",
        },
    )


ENGRAM_SUM_ROWS = _operator("engram_sum_rows")
ENGRAM_ROW_ADAM = _operator("engram_row_adam")


def sum_equal_rows(
    rows: Tensor, grads: Tensor, *, is_padded: bool = False, backend: str = "auto"
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Each row once, ascending, [u] int64, and the sum of its gradients, [u, dim] fp32.

    rows: [m] int64, not negative, in any order and number. grads: [m, dim] floating point. Added up
    in fp32 (fp64 stays) in the order in which they are given: the same bits in every run of one
    backend. m = 0 is allowed. The host waits for the device, which alone knows u; is_padded: it
    does not, and the results have m rows, behind the u of them -1 and sums of 0.
    """
    check_int64("rows", rows, 1)
    if grads.ndim != 2 or len(grads) != len(rows) or not grads.is_floating_point():
        got = f"{tuple(grads.shape)} {grads.dtype}"
        raise ValueError(f"grads must be [{len(rows)}, dim] floating point, got {got}")
    is_wide = grads.dtype == torch.float64
    name = ENGRAM_SUM_ROWS.resolve("ref" if is_wide and backend == "auto" else backend, rows.device)
    ascending, order = rows.sort(stable=True)
    if is_padded:
        unique, ends = _padded_runs(ascending)
    else:
        unique, counts = torch.unique_consecutive(ascending, return_counts=True)
        ends = counts.cumsum(0)
    if name == "triton":
        check_for_kernel(rows.device, is_floating=False, grads=grads)
        if is_wide:
            raise ValueError(f"grads must be 16 or 32 bits wide for triton, got {grads.dtype}")
    return unique, torch.ops.model1.engram_sum_rows(grads, order, ends, name)


def _padded_runs(ascending: Tensor) -> tuple[Tensor, Tensor]:
    """The value of each run of equal numbers and where it ends; as many more that are -1, empty."""
    size = len(ascending)
    if size == 0:
        return ascending, ascending
    is_first = torch.ones_like(ascending, dtype=torch.bool)
    is_first[1:] = ascending[1:] != ascending[:-1]
    run = is_first.cumsum(0) - 1
    values = torch.full_like(ascending, -1).scatter_(0, run, ascending)
    position = torch.arange(1, size + 1, device=ascending.device)
    ends = torch.full_like(ascending, size)
    return values, ends.scatter_reduce_(0, run, position, "amax", include_self=False)


def row_adam_step(
    table: Tensor,
    mean: Tensor,
    square: Tensor,
    steps: Tensor,
    rows: Tensor,
    grads: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    backend: str = "auto",
) -> None:
    """One step of Adam in place on some rows of a table; no other row is read or written.

    m += (1 - beta1) (g - m);  v += (1 - beta2) (g^2 - v);  n += 1
    row -= lr (m / (1 - beta1^n)) / (sqrt(v / (1 - beta2^n)) + eps)

    table: [rows, dim] fp32 or bf16. mean, square: like it, fp32. steps: [rows, 1] fp32, how often
    each row was trained. rows: [u] int64, none twice, all within the table or -1, which is skipped.
    grads: [u, dim] fp32; a row whose gradient is exactly zero keeps every bit. All contiguous but
    grads. Computed in fp32. Source: arXiv 1412.6980, row by row as in arXiv 2601.07372's tables.
    """
    if table.ndim != 2 or table.dtype not in _FLOATS:
        got = f"{tuple(table.shape)} {table.dtype}"
        raise ValueError(f"table must be [rows, dim] float32 or bfloat16, got {got}")
    check_int64("rows", rows, 1)
    shape = tuple(table.shape)
    for name, tensor, wanted in (
        ("mean", mean, shape),
        ("square", square, shape),
        ("steps", steps, (shape[0], 1)),
        ("grads", grads, (len(rows), shape[1])),
    ):
        check_shape(name, tensor, wanted)
        if tensor.dtype != torch.float32:
            raise ValueError(f"{name} must be float32, got {tensor.dtype}")
    for name, tensor in (("table", table), ("mean", mean), ("square", square), ("steps", steps)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    name = ENGRAM_ROW_ADAM.resolve(backend, table.device)
    check_for_kernel(
        table.device, is_floating=False, mean=mean, square=square, steps=steps, rows=rows,
        grads=grads,
    )  # fmt: skip
    run = torch.ops.model1.engram_row_adam
    run(table, mean, square, steps, rows, grads, lr, beta1, beta2, eps, name)


@torch.library.custom_op("model1::engram_sum_rows", mutates_args=())
def _engram_sum_rows(grads: Tensor, order: Tensor, ends: Tensor, backend: str) -> Tensor:
    return ENGRAM_SUM_ROWS.load(backend)(grads, order, ends)


@_engram_sum_rows.register_fake
def _(grads: Tensor, order: Tensor, ends: Tensor, backend: str) -> Tensor:
    dtype = torch.promote_types(grads.dtype, torch.float32)
    return grads.new_empty((ends.shape[0], grads.shape[1]), dtype=dtype)


@torch.library.custom_op(
    "model1::engram_row_adam", mutates_args=("table", "mean", "square", "steps")
)
def _engram_row_adam(
    table: Tensor, mean: Tensor, square: Tensor, steps: Tensor, rows: Tensor, grads: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, backend: str,
) -> None:  # fmt: skip
    run = ENGRAM_ROW_ADAM.load(backend)
    run(table, mean, square, steps, rows, grads, lr, beta1, beta2, eps)


@_engram_row_adam.register_fake
def _(*args: object) -> None:
    return None
