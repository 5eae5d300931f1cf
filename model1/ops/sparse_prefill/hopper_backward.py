"""Sparse prefill backward on Hopper: what it takes, and its launch."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.hopper.launch import ALIGNMENT_BYTES, HEADS
from model1.ops.launch import launch_options
from model1.ops.sparse_prefill.hopper_backward_kernel import _sparse_attn_bwd_hopper_kernel
from model1.ops.sparse_prefill.pairs import add_pairs
from model1.ops.sparse_prefill.portable import MODELS, compile_case
from model1.ops.sparse_prefill.portable_backward import row_sums, rows_at_once

_OPTIONS = launch_options(8, 1)  # the layouts of the tiles are those of eight warps
_UNIT = 8  # numbers of 16 bytes, in which the kernel counts strides


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
) -> tuple[Tensor, Tensor, Tensor]:
    """See `sparse_prefill_backward_ref`; for calls that `choice` does not refuse.

    A row of dq depends on its own valid entries alone, to the bit, with `deterministic` and
    without. What cannot be copied in pieces of 16 bytes is copied to where it can first.
    """
    (t, h, d), topk = q.shape, topk_indices.shape[1]
    dq = torch.empty(t, h, d, dtype=q.dtype, device=q.device)
    dkv = torch.zeros(kv.shape, dtype=torch.float32, device=q.device)
    num_tiles = -(-h // HEADS)
    rows, sums = t, dkv
    if deterministic:
        rows = min(t, rows_at_once(num_tiles, topk, d))
        sums = torch.empty(rows * num_tiles * topk, d, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        log2_total, delta, dsink = row_sums(_with_rows(dout), out, lse, attn_sink)
        dout, q, keys = (_aligned(x) for x in (dout, q, kv if len(kv) else kv.new_zeros(1, d)))
        for first in range(0, t, max(rows, 1)):
            last = min(first + rows, t)
            _sparse_attn_bwd_hopper_kernel[((last - first) * num_tiles,)](
                dout, q, keys, topk_indices, topk_length, log2_total, delta, dq, sums,
                dout.stride(0) // _UNIT, dout.stride(1) // _UNIT, q.stride(0) // _UNIT,
                q.stride(1) // _UNIT, keys.stride(0) // _UNIT, topk_indices.stride(0),
                first, h, len(kv), topk, softmax_scale, 0,
                D=d, DETERMINISTIC=deterministic, **_OPTIONS,
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


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """The kernel for rows of 512 and 576 channels; on Hopper alone."""
    if target != KernelTarget("cuda", 90):
        return []
    return [
        compile_case(
            f"hopper {name}" + " deterministic" * deterministic, _sparse_attn_bwd_hopper_kernel,
            {"D": d, "DETERMINISTIC": deterministic}, _OPTIONS,
        )
        for (name, d), deterministic in product(MODELS.items(), (False, True))
    ]  # fmt: skip
