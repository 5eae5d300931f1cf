"""Triton kernel for the gradient of phi: streams, transposed, by the gradient of their products.

A program takes a block of channels over a part of the tokens; parts are added up in a fixed order.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# pyright: reportAssignmentType=none, reportOperatorIssue=none, reportArgumentType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options, num_sms
from model1.ops.mhc.portable import (
    SHIPPED,
    SHIPPED_WIDTH,
    Config,
    compile_case,
    project_constants,
)
from model1.ops.mhc.portable_backward import token_splits
from model1.ops.rounding import round_to

# On an H200, 2026-12-01: of a copy 79 and 58 % with 3,072 and 16,384 channels of all streams
FEW_CHANNELS = Config(block_t=64, block_c=256, num_warps=8, num_stages=3, programs_per_sm=1)
# 67 and 73 %
MANY_CHANNELS = Config(block_t=64, block_c=128, num_warps=4, num_stages=3, programs_per_sm=2)


def choose_phi_config(n: int, c: int) -> Config:
    """How the gradient is cut for n streams of c channels."""
    return FEW_CHANNELS if n * c < 8192 else MANY_CHANNELS


@triton.jit(do_not_specialize=["t", "splits", "tokens_per_split"])
def _phi_bwd_kernel(
    x_ptr, d_product_ptr, d_phi_ptr, t, splits, tokens_per_split,
    N: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    # x [t, N * C]; d_phi [splits, WIDTH, N * C]
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # the interpreter multiplies matrices in fp32 alone
    FACTOR: tl.constexpr = tl.float32 if INTERPRETED else DTYPE
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.arange(0, BLOCK_W)
    d_phi = tl.zeros((BLOCK_C, BLOCK_W), tl.float32)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, t), BLOCK_T):
        token = (start + tl.arange(0, BLOCK_T)).to(tl.int64)[:, None]
        is_token = token < t
        is_x = is_token & (channel < N * C)[None, :]
        x = tl.load(x_ptr + token * (N * C) + channel[None, :], mask=is_x, other=0.0)
        is_product = is_token & (column < WIDTH)[None, :]
        of_product = d_product_ptr + token * BLOCK_W + column[None, :]
        grad = tl.load(of_product, mask=is_product, other=0.0)
        high = round_to(grad, DTYPE, INTERPRETED)
        low = round_to(grad - high.to(tl.float32), DTYPE, INTERPRETED).to(FACTOR)
        factor = tl.trans(x.to(FACTOR))
        d_phi = tl.dot(factor, low, acc=d_phi)
        d_phi = tl.dot(factor, high.to(FACTOR), acc=d_phi)
    part = d_phi_ptr + split.to(tl.int64) * (WIDTH * N * C)
    mask = (channel < N * C)[:, None] & (column < WIDTH)[None, :]
    tl.store(part + column[None, :] * (N * C) + channel[:, None], d_phi, mask=mask)


def phi_gradient(x: Tensor, phi: Tensor, d_product: Tensor) -> Tensor:
    """Gradient of phi from bf16 streams x [t, n, c], contiguous, and from that of their products.

    d_product: see `model1.ops.mhc.portable_backward.product_gradient`; as exact as fp32, for it
    goes in two parts of the streams' dtype.
    """
    t, n, c = x.shape
    config = choose_phi_config(n, c)
    blocks = -(-n * c // config.block_c)
    splits, tokens_per_split = token_splits(t, blocks, config, num_sms(x.device))
    d_phi = torch.empty(splits, *phi.shape, dtype=torch.float32, device=x.device)
    if t > 0:
        kernel: Any = _phi_bwd_kernel
        with torch.cuda.device_of(x):
            kernel[(blocks * splits,)](
                x, d_product, d_phi, t, splits, tokens_per_split,
                INTERPRETED=knobs.runtime.interpret,
                **project_constants(n, c, phi.shape[0], config),
                **launch_options(config.num_warps, config.num_stages),
            )  # fmt: skip
    return d_phi.sum(0).to(phi.dtype)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The gradient of phi of four streams of 4096 channels, cut either way."""
    cases = []
    for name, config in (("few", FEW_CHANNELS), ("many", MANY_CHANNELS)):
        constants = project_constants(*SHIPPED, SHIPPED_WIDTH, config) | {"INTERPRETED": False}
        options = config.num_warps, config.num_stages
        cases.append(
            compile_case(f"phi backward {name} channels", _phi_bwd_kernel, constants, *options)
        )
    return cases
