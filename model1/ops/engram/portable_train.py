"""Triton kernels that train a table's rows: sums of equal rows' gradients, and Adam in place.

A sum belongs to one program, which adds in a fixed order. Adam touches a row's numbers once.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to


@dataclass(frozen=True)
class Config:
    """How the work is cut. Other cuts were not measured."""

    channels: int = 256  # of a program that sums
    gradients: int = 16  # that it loads at a time
    elements: int = 1024  # of a program that trains rows, at least one row
    num_warps: int = 4


@triton.jit
def _engram_sum_rows_kernel(
    grads_ptr, stride_grads, order_ptr, ends_ptr, sums_ptr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    NUM_CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    run = (tl.program_id(0) // NUM_CHUNKS).to(tl.int64)
    channel = tl.program_id(0) % NUM_CHUNKS * BLOCK_D + tl.arange(0, BLOCK_D)[None]
    start = tl.load(ends_ptr + run - 1, mask=run > 0, other=0)
    end = tl.load(ends_ptr + run)
    total = tl.zeros((1, BLOCK_D), tl.float32)
    for first in range(start, end, BLOCK_M):
        at = first + tl.arange(0, BLOCK_M)[:, None]
        row = tl.load(order_ptr + at, mask=at < end, other=0)
        mask = (at < end) & (channel < D)
        grads = tl.load(grads_ptr + row * stride_grads + channel, mask=mask, other=0.0)
        total += tl.sum(grads.to(tl.float32), axis=0)[None]
    tl.store(sums_ptr + run * D + channel, total, mask=channel < D)


@triton.jit(do_not_specialize=["num_rows", "num_wanted", "lr", "eps"])
def _engram_row_adam_kernel(
    table_ptr, mean_ptr, square_ptr, steps_ptr, rows_ptr, grads_ptr, stride_grads,
    num_rows, num_wanted, lr, rest1, rest2, log_beta1, log_beta2, eps,
    D: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    wanted = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel = tl.arange(0, BLOCK_D)[None]
    row = tl.load(rows_ptr + wanted, mask=wanted < num_wanted, other=-1)
    is_row = (row >= 0) & (row < num_rows)
    mask = is_row[:, None] & (channel < D)
    grads_at = grads_ptr + wanted[:, None] * stride_grads + channel
    grad = tl.load(grads_at, mask=mask, other=0.0)
    is_touched = is_row & (tl.sum((grad != 0.0).to(tl.int32), axis=1) > 0)
    mask = is_touched[:, None] & (channel < D)
    at = row[:, None] * D + channel
    mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    square = tl.load(square_ptr + at, mask=mask, other=0.0)
    count = tl.load(steps_ptr + row, mask=is_touched, other=0.0) + 1.0
    mean += rest1 * (grad - mean)
    square += rest2 * (grad * grad - square)
    mean_hat = mean / (1.0 - tl.exp(count * log_beta1))[:, None]
    square_hat = square / (1.0 - tl.exp(count * log_beta2))[:, None]
    value = tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
    value -= lr * mean_hat / (tl.sqrt(square_hat) + eps)
    # several warps may hold the same number: none may still load what another has stored
    tl.debug_barrier()
    tl.store(mean_ptr + at, mean, mask=mask)
    tl.store(square_ptr + at, square, mask=mask)
    tl.store(steps_ptr + row, count, mask=is_touched)
    tl.store(table_ptr + at, round_to(value, table_ptr.dtype.element_ty, INTERPRETED), mask=mask)


def engram_sum_rows_triton(
    grads: Tensor, order: Tensor, ends: Tensor, config: Config | None = None
) -> Tensor:
    """See `model1.ops.engram.ref_train.engram_sum_rows_ref`."""
    config, d = config or Config(), grads.shape[1]
    sums = torch.empty((len(ends), d), dtype=torch.float32, device=grads.device)
    if sums.numel() == 0:
        return sums
    grads = grads if grads.stride(1) == 1 else grads.contiguous()
    sizes = _sum_sizes(d, config)
    kernel: Any = _engram_sum_rows_kernel
    with torch.cuda.device_of(grads):
        kernel[(len(ends) * -(-d // sizes["BLOCK_D"]),)](
            grads, grads.stride(0), order, ends, sums, **sizes,
            **launch_options(config.num_warps, 1),
        )  # fmt: skip
    return sums


def engram_row_adam_triton(
    table: Tensor, mean: Tensor, square: Tensor, steps: Tensor, rows: Tensor, grads: Tensor,
    lr: float, beta1: float, beta2: float, eps: float, config: Config | None = None,
) -> None:  # fmt: skip
    """See `model1.ops.engram.row_adam.row_adam_step`."""
    config, d = config or Config(), table.shape[1]
    if grads.numel() == 0:
        return
    grads = grads if grads.stride(1) == 1 else grads.contiguous()
    sizes = _adam_sizes(d, config)
    logs = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
    kernel: Any = _engram_row_adam_kernel
    with torch.cuda.device_of(table):
        kernel[(-(-len(rows) // sizes["BLOCK_R"]),)](
            table, mean, square, steps, rows.contiguous(), grads, grads.stride(0), len(table),
            len(rows), lr, 1.0 - beta1, 1.0 - beta2, *logs, eps,
            INTERPRETED=knobs.runtime.interpret, **sizes, **launch_options(config.num_warps, 1),
        )  # fmt: skip


def _sum_sizes(d: int, config: Config) -> dict[str, Any]:
    block_d = min(config.channels, triton.next_power_of_2(d))
    return {"D": d, "BLOCK_M": config.gradients, "BLOCK_D": block_d}


def _adam_sizes(d: int, config: Config) -> dict[str, Any]:
    block_d = triton.next_power_of_2(d)
    return {"D": d, "BLOCK_R": max(1, config.elements // block_d), "BLOCK_D": block_d}


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 256 channels in fp32, gradients in fp32."""
    config, cases = Config(), []
    names = ("grads_ptr", "sums_ptr", "table_ptr", "mean_ptr", "square_ptr", "steps_ptr")
    numbers = ("lr", "rest1", "rest2", "log_beta1", "log_beta2", "eps")
    signature = dict.fromkeys(names, "*fp32") | dict.fromkeys(numbers, "fp32")
    signature |= dict.fromkeys(("order_ptr", "ends_ptr", "rows_ptr"), "*i64")
    signature |= {"num_rows": "i32", "num_wanted": "i32"}
    for kernel, name, sizes in (
        (_engram_sum_rows_kernel, "sums", _sum_sizes(256, config)),
        (_engram_row_adam_kernel, "Adam", _adam_sizes(256, config)),
    ):
        constants = sizes | {"stride_grads": 256, "INTERPRETED": False}
        own = {x: value for x, value in constants.items() if x in kernel.arg_names}
        cases.append(
            CompileCase(
                name=f"engram_rows {name}",
                kernel=kernel,
                signature=signature | dict.fromkeys(own, "constexpr"),
                constexprs=own,
                num_warps=config.num_warps,
                num_stages=1,
            )
        )
    return cases
