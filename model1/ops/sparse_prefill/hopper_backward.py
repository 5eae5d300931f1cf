"""Sparse prefill backward on Hopper: what it takes, and its launches."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.hopper.launch import ALIGNMENT_BYTES, BF16_OPTIONS, HEADS
from model1.ops.launch import launch_options
from model1.ops.sparse_prefill.config import HopperBackwardConfig, hopper_backward_config
from model1.ops.sparse_prefill.hopper_backward_kernel import (
    _sparse_attn_bwd_even_kernel,
    _sparse_attn_bwd_hopper_kernel,
)
from model1.ops.sparse_prefill.pairs import add_pairs
from model1.ops.sparse_prefill.portable import MODELS, compile_case
from model1.ops.sparse_prefill.portable_backward import row_sums, rows_at_once

EVEN_WARPS = 8  # of the kernel whose warps are all alike
_UNIT = 8  # numbers of 16 bytes, in which the kernels count strides
_SPILL_LIMIT_BYTES = 96  # docs/kernels_hopper.md says where


def sparse_prefill_backward_hopper(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    deterministic: bool,
    config: HopperBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparse_prefill_backward_ref`; for calls that `choice` does not refuse.

    A row of dq depends on its own valid entries alone, to the bit, with `deterministic` and
    without. What cannot be copied in pieces of 16 bytes is copied to where it can first. `config`
    replaces the table's choice.
    """
    (t, h, d), topk = q.shape, topk_indices.shape[1]
    config = config or hopper_backward_config(d, deterministic)
    dq = torch.empty(t, h, d, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
    num_tiles = -(-h // HEADS)
    rows, sums = t, dkv
    if deterministic:
        rows = min(t, rows_at_once(num_tiles, topk, d))
        sums = torch.empty(rows * num_tiles * topk, d, dtype=torch.float32, device=q.device)
    kernel, fixed = _launch(config, d, deterministic)
    with torch.cuda.device_of(q):
        log2_total, delta, dsink = row_sums(_with_rows(dout), out, lse, attn_sink)
        dout, q, keys = (_aligned(x) for x in (dout, q, kv if len(kv) else kv.new_zeros(1, d)))
        for first in range(0, t, max(rows, 1)):
            last = min(first + rows, t)
            kernel[((last - first) * num_tiles,)](
                dout, q, keys, topk_indices, topk_length, log2_total, delta, dq, sums,
                dout.stride(0) // _UNIT, dout.stride(1) // _UNIT, q.stride(0) // _UNIT,
                q.stride(1) // _UNIT, keys.stride(0) // _UNIT, topk_indices.stride(0),
                first, h, len(kv), topk, softmax_scale, 0, **fixed,
            )  # fmt: skip
            if deterministic:
                lengths = None if topk_length is None else topk_length[first:last]
                add_pairs(dkv, sums, topk_indices[first:last], lengths, num_tiles)
    return dq, dkv.to(kv.dtype), dsink


def _with_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x or, where its rows do not start at multiples of 16 bytes, a copy."""
    strides = [stride % _UNIT for stride in x.stride()[:-1]]
    if x.stride(-1) != 1 or any(strides) or x.data_ptr() % ALIGNMENT_BYTES:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _launch(
    config: HopperBackwardConfig, d: int, deterministic: bool
) -> tuple[Any, dict[str, Any]]:
    """The kernel of a configuration, its compile-time arguments and options."""
    fixed = {
        "D": d,
        "DETERMINISTIC": deterministic,
        "PIECE": config.piece,
        "AHEAD": config.ahead,
        "WIDE": config.wide,
    }
    if not config.is_divided:
        return _sparse_attn_bwd_even_kernel, fixed | launch_options(EVEN_WARPS, 1)
    return _sparse_attn_bwd_hopper_kernel, fixed | {"REGISTERS": config.registers} | BF16_OPTIONS


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Both kernels for rows of 512 and 576 channels; on Hopper alone."""
    if target != KernelTarget("cuda", 90):
        return []
    cases = []
    limit = {"spill_limit_bytes": _SPILL_LIMIT_BYTES}
    divided = limit | launch_options(4, 1) | {"max_registers": BF16_OPTIONS["maxnreg"]}
    even = limit | launch_options(EVEN_WARPS, 1)
    for (name, d), deterministic in product(MODELS.items(), (False, True)):
        for is_divided in (True, False):
            config = hopper_backward_config(d, deterministic, is_divided=is_divided)
            kernel, fixed = _launch(config, d, deterministic)
            constants = {x: y for x, y in fixed.items() if x in kernel.arg_names}
            kind = f"hopper {name}" + " deterministic" * deterministic + " even" * (not is_divided)
            options = divided if is_divided else even
            cases.append(compile_case(kind, kernel, constants, options))
    return cases
