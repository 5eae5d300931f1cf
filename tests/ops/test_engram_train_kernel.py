"""Training of a table's rows: sums of equal rows and Adam, oracle and kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from engram_cases import DEVICE
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.engram import row_adam_step, sum_equal_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
OPTIONS = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-10}


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "dim"), [(0, 8), (1, 1), (50, 24), (90, 300)])
def test_sums_equal_a_loop(m: int, dim: int, dtype: torch.dtype, backend: str) -> None:
    rows, grads = torch.randint(7, (m,)) * 2**33, torch.randn(m, dim).to(dtype)
    rows[: m // 2] = 5  # a hot row
    unique, sums = sum_equal_rows(rows.to(DEVICE), grads.to(DEVICE), backend=backend)
    assert sums.dtype == torch.float32
    assert unique.tolist() == sorted(set(rows.tolist()))
    for row, total in zip(unique.tolist(), sums.cpu(), strict=True):
        want = grads[rows == row].double().sum(0)
        torch.testing.assert_close(total.double(), want, rtol=1e-5, atol=1e-5)
    again = sum_equal_rows(rows.to(DEVICE), grads.to(DEVICE), backend=backend)
    assert backend == "ref" or torch.equal(again[1], sums)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [0, 1, 50])
def test_padded_sums_are_the_same_and_change_no_other_row(m: int, backend: str) -> None:
    rows, grads = torch.randint(7, (m,)).to(DEVICE), torch.randn(m, 24).to(DEVICE)
    unique, sums = sum_equal_rows(rows, grads, backend=backend)
    padded, padded_sums = sum_equal_rows(rows, grads, is_padded=True, backend=backend)
    assert len(padded) == len(padded_sums) == m
    assert torch.equal(padded[: len(unique)], unique)
    if backend == "ref":  # on a GPU in no fixed order
        torch.testing.assert_close(padded_sums[: len(unique)], sums)
        padded_sums[: len(unique)] = sums
    assert torch.equal(padded_sums[: len(unique)], sums)
    assert (padded[len(unique) :] == -1).all()
    assert not padded_sums[len(unique) :].any()
    options = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "backend": backend}
    stepped, want = state(9, 24), state(9, 24)
    for tensor, other in zip(stepped, want, strict=True):
        tensor.copy_(other)
    padded_sums[len(unique) :] = math.nan  # rows of -1 are not looked at
    row_adam_step(*stepped, padded, padded_sums, **options)
    row_adam_step(*want, unique, sums, **options)
    assert all(map(torch.equal, stepped, want))


def test_a_sum_does_not_depend_on_other_rows() -> None:
    grads = torch.randn(9, 16).to(DEVICE)
    rows = torch.tensor([3, 1, 3, 8, 3, 1, 0, 8, 3]).to(DEVICE)
    unique, sums = sum_equal_rows(rows, grads, backend="triton")
    is_three = rows == 3
    _, alone = sum_equal_rows(rows[is_three], grads.T.contiguous().T[is_three], backend="triton")
    assert torch.equal(alone[0], sums[unique == 3][0])
    grads[3, 2] = math.nan
    _, bad = sum_equal_rows(rows, grads, backend="triton")
    assert bad.isnan().nonzero().tolist() == [[3, 2]]


def state(num_rows: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """table, mean, square and steps of a fresh run."""
    zeros = [torch.zeros(num_rows, n) for n in (dim, dim, 1)]
    return [x.to(DEVICE) for x in (torch.randn(num_rows, dim).to(dtype), *zeros)]


def adam_in_float64(table: Tensor, history: list[dict[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """Rows by a loop over the steps that have a gradient of them."""
    out = table.double().clone()
    for row in range(len(table)):
        m, v, n = *torch.zeros(2, table.shape[1]).double(), 0
        for step in history:
            if row not in step or not step[row].any():
                continue
            g, n = step[row].double(), n + 1
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
            update = m / (1 - 0.9**n) / ((v / (1 - 0.99**n)).sqrt() + 1e-10)
            out[row] = (out[row] - 0.01 * update).to(dtype).double()
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adam_equals_a_loop_in_float64_and_leaves_other_rows(
    dtype: torch.dtype, backend: str
) -> None:
    tensors, history = state(20, 40, dtype), []
    before = [x.clone() for x in tensors]
    for rows in ([3, 7, 19], [7], [], [0, 3, 7]):
        grads = torch.randn(len(rows), 40)
        if len(rows) == 1:
            grads *= 1e-4
        if rows[:1] == [0]:
            grads[0] = 0  # read, but of no influence
        history.append(dict(zip(rows, grads, strict=True)))
        where = torch.tensor(rows, dtype=torch.int64).to(DEVICE)
        row_adam_step(*tensors, where, grads.to(DEVICE), **OPTIONS, backend=backend)
    want = adam_in_float64(before[0].cpu(), history, dtype)
    rtol, atol = (1e-6, 1e-6) if dtype == torch.float32 else (2**-7, 0.0)
    torch.testing.assert_close(tensors[0].cpu().double(), want, rtol=rtol, atol=atol)
    untouched = torch.ones(20, dtype=torch.bool, device=DEVICE)
    untouched[[3, 7, 19]] = False
    for now, then in zip(tensors, before, strict=True):
        assert torch.equal(now[untouched], then[untouched])
    assert tensors[3][[3, 7, 19], 0].tolist() == [2, 3, 1]


@pytest.mark.parametrize("dim", [1, 24, 256, 1030])
def test_kernel_and_reference_agree_step_by_step(dim: int) -> None:
    ours = state(50, dim)
    theirs = [x.clone() for x in ours]
    for _ in range(5):
        rows = torch.randperm(50)[: 1 + dim % 30].to(DEVICE)
        grads = torch.randn(dim, len(rows)).to(DEVICE).T
        row_adam_step(*ours, rows, grads, **OPTIONS, backend="triton")
        row_adam_step(*theirs, rows, grads, **OPTIONS, backend="ref")
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_kernel_skips_rows_outside_the_table() -> None:
    tensors = state(4, 8)
    rows = torch.tensor([-1, 4, 2**40, 2]).to(DEVICE)
    before = tensors[0].clone()
    row_adam_step(*tensors, rows, torch.ones(4, 8).to(DEVICE), **OPTIONS, backend="triton")
    assert (tensors[0] != before).any(1).tolist() == [False, False, True, False]
    assert tensors[3].flatten().tolist() == [0, 0, 1, 0]


def test_the_operators_describe_themselves_to_pytorch() -> None:
    tensors, rows, grads = state(6, 8), torch.tensor([1, 4]).to(DEVICE), torch.ones(2, 8).to(DEVICE)
    numbers = tuple(OPTIONS.values())
    adam = torch.ops.model1.engram_row_adam.default
    torch.library.opcheck(adam, (*tensors, rows, grads, *numbers, "triton"))
    sums = torch.ops.model1.engram_sum_rows.default
    order = torch.tensor([1, 0]).to(DEVICE)
    torch.library.opcheck(sums, (grads, order, order.sort().values + 1, "triton"))


def test_bad_arguments_name_value_and_rule() -> None:
    table, mean, square, steps = state(6, 8)
    half = table.half()
    rows, grads = torch.tensor([1, 4]).to(DEVICE), torch.ones(2, 8).to(DEVICE)
    for message, arguments in (
        (r"table must be .* float32 or bfloat16, got .*float16", (half, mean, square, steps)),
        (r"mean must have shape \(6, 8\), got \(5, 8\)", (table, mean[:5], square, steps)),
        (r"square must be float32, got torch\.bfloat16", (table, mean, square.bfloat16(), steps)),
        (r"steps must have shape \(6, 1\), got \(6,\)", (table, mean, square, steps[:, 0])),
        ("mean must be contiguous", (table, mean.T.contiguous().T, square, steps)),
        (f"mean must be on {table.device}, got meta", (table, mean.to("meta"), square, steps)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            row_adam_step(*arguments, rows, grads, **OPTIONS, backend="triton")
    with pytest.raises(ValueError, match=r"rows must be int64 with 1 axes, got torch\.int32"):
        sum_equal_rows(rows.int(), grads)
    with pytest.raises(ValueError, match=r"grads must be \[2, dim\] floating point, got \(3, 8\)"):
        sum_equal_rows(rows, torch.ones(3, 8).to(DEVICE))
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        sum_equal_rows(rows, grads, backend="cuda")
