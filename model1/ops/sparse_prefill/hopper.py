"""Sparse prefill forward on Hopper: what it takes, and its launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.hopper.launch import (
    ALIGNMENT_BYTES,
    BF16,
    BF16_OPTIONS,
    CHANNELS,
    HEADS,
    addressing,
    body_sizes,
    compile_case,
    few_cases,
    tensor_map,
)
from model1.ops.hopper.overlap import OVERLAP
from model1.ops.hopper.schedule import Lists, whole_items
from model1.ops.launch import fast_divisor, launch_options, num_sms
from model1.ops.sparse_prefill.hopper_kernel import _sparse_attn_fwd_kernel


def sparse_prefill_hopper(
    q: Tensor,
    kv: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    attn_sink: Tensor | None,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.sparse_prefill.sparse_prefill`; for calls that `choice` does not refuse.

    A row's bits depend on its own valid entries alone, with `deterministic` and without: no list is
    split, and a block without a valid entry changes nothing. Queries whose strides or start a
    tensor map cannot describe are copied first, and so are keys whose rows do not start at
    multiples of 16 bytes.
    """
    t, h, _ = q.shape
    out = torch.empty(t, h, value_dim, dtype=q.dtype, device=q.device)
    max_logits = torch.empty(t, h, dtype=torch.float32, device=q.device)
    lse = torch.empty(t, h, dtype=torch.float32, device=q.device)
    if t == 0:
        return out, max_logits, lse
    sizes = body_sizes(True, h)
    heads = sizes["COLUMNS"] or HEADS
    groups = -(-h // heads)
    num_programs = max(1, num_sms(q.device) // groups)
    items = None
    with torch.cuda.device_of(q):
        if topk_length is not None:
            lists = Lists(
                b=t, s_q=1, topk=topk_indices.shape[1], extra_topk=0, length=topk_length,
                extra_length=None, device=q.device,
            )  # fmt: skip
            items = whole_items(lists, num_programs)
        _sparse_attn_fwd_kernel[(num_programs * groups,)](
            tensor_map(q[:, None], 256, heads),
            tensor_map(q[:, None], 64, heads) if q.shape[2] > CHANNELS else None,
            tensor_map(out[:, None], 256, heads), lse, max_logits, attn_sink, items,
            0 if items is None else items.stride(0), topk_indices, topk_indices.stride(0),
            *_keys(kv), h, groups, t, topk_indices.shape[1], softmax_scale * math.log2(math.e),
            empty_lse, 0, **sizes, **BF16_OPTIONS, **({} if items is None else OVERLAP),
        )  # fmt: skip
    return out, max_logits, lse


def _keys(kv: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """The rows as a cache with blocks of one token."""
    num_keys = len(kv)
    if num_keys == 0:  # rows that do not exist are asked for at the first
        kv = kv.new_zeros(1, kv.shape[1])
    row_bytes = kv.stride(0) * kv.element_size()
    if kv.data_ptr() % ALIGNMENT_BYTES or row_bytes % ALIGNMENT_BYTES or row_bytes < 0:
        kv = kv.clone(memory_format=torch.contiguous_format)
        row_bytes = kv.stride(0) * kv.element_size()
    where = addressing(row_bytes // ALIGNMENT_BYTES, 1, *fast_divisor(1), num_keys - 1)
    return kv.view(torch.uint8), *where


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 512 and 576 channels, with a sink, all lists alike and listed; on Hopper alone."""
    if target != KernelTarget("cuda", 90):
        return []
    kernel = _sparse_attn_fwd_kernel
    options = {**launch_options(4, 1), "max_registers": BF16_OPTIONS["maxnreg"]}
    listed = options | {"spill_limit_bytes": 8}  # outside the loops
    narrow = BF16 | {"rope_desc": None}
    return [
        compile_case("sparse_prefill 512", kernel, narrow, listed),
        compile_case("sparse_prefill 512 even", kernel, narrow | {"items_ptr": None}, options),
        compile_case("sparse_prefill 576", kernel, BF16, options),
        compile_case("sparse_prefill 576 even", kernel, BF16 | {"items_ptr": None}, options),
        *few_cases("sparse_prefill 512 even", kernel, True, {"rope_desc": None, "items_ptr": None}),
        *few_cases("sparse_prefill 576", kernel, True, {}),
    ]  # fmt: skip
