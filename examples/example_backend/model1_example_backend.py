"""The smallest backend for Model1: every operator in plain PyTorch, one of them its own.

A port to another accelerator starts like this and replaces entry after entry with its kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.activation.ref import swiglu_backward_ref, swiglu_ref
from model1.ops.cross_entropy.ref import linear_cross_entropy_ref
from model1.ops.engram.formats import engram_gather_ref
from model1.ops.engram.ref import (
    engram_causal_conv_backward_ref,
    engram_causal_conv_ref,
    engram_gate_backward_ref,
    engram_gate_ref,
    engram_hash_ref,
)
from model1.ops.engram.ref_train import engram_row_adam_ref, engram_sum_rows_ref
from model1.ops.fp8_linear.ref import fp8_matmul_ref, fp8_quantize_ref
from model1.ops.kv_cache import KVLayout, gather_and_dequantize
from model1.ops.kv_cache.ref import (
    gather_and_dequantize_ref,
    gather_rope_ref,
    quantize_and_store_ref,
)
from model1.ops.kv_write.ref import norm_rope_store_ref
from model1.ops.lowrank_attention.ref import lowrank_attention_ref
from model1.ops.lowrank_remainder.ref import lowrank_remainder_ref
from model1.ops.mha_prefill.ref import mha_prefill_backward_ref, mha_prefill_ref
from model1.ops.mhc.ref import (
    mhc_coefficients_backward_ref,
    mhc_coefficients_ref,
    mhc_collapse_backward_ref,
    mhc_collapse_norm_backward_ref,
    mhc_collapse_norm_ref,
    mhc_collapse_ref,
    mhc_enter_backward_ref,
    mhc_enter_ref,
    mhc_head_backward_ref,
    mhc_head_ref,
    mhc_seam_backward_ref,
    mhc_seam_ref,
    mhc_write_back_backward_ref,
    mhc_write_back_collapse_norm_backward_ref,
    mhc_write_back_collapse_norm_ref,
    mhc_write_back_ref,
)
from model1.ops.moe.ref import (
    moe_experts_backward_ref,
    moe_experts_fp8_ref,
    moe_experts_ref,
    moe_route_backward_ref,
    moe_route_ref,
)
from model1.ops.norm.ref import rms_norm_backward_ref, rms_norm_ref
from model1.ops.paged_decode.ref import paged_decode_ref
from model1.ops.rope.ref import norm_rotate_tail_backward_ref, rotate_tail_ref
from model1.ops.rope_gate.ref import inverse_rope_gate_backward_ref, inverse_rope_gate_ref
from model1.ops.selector.ref import lightning_topk_ref, lowrank_topk_ref
from model1.ops.sparse_decode.ref import sparse_decode_ref
from model1.ops.sparse_prefill.ref import sparse_prefill_backward_ref, sparse_prefill_ref


def sparse_decode(
    q: Tensor, kv_cache: Tensor, topk_indices: Tensor, *, deterministic: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """`model1.ops.sparse_decode`; its arguments are checked.

    A sum over a whole batch may round otherwise than one over a row: what must not depend on the
    batch is left to the reference.
    """
    if deterministic:
        return sparse_decode_ref(q, kv_cache, topk_indices, deterministic=True, **options)
    return _whole_batch(q, kv_cache, topk_indices, **options)


def _whole_batch(
    q: Tensor,
    kv_cache: Tensor,
    topk_indices: Tensor,
    *,
    topk_length: Tensor | None,
    extra_kv_cache: Tensor | None,
    extra_topk_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    layout: KVLayout,
    block_size: int,
    extra_block_size: int,
    value_dim: int,
    softmax_scale: float,
    empty_lse: float,
) -> tuple[Tensor, Tensor]:
    """One product for all rows. What is no slot of its cache counts for nothing."""
    scopes = [(kv_cache, topk_indices, topk_length, block_size)]
    if extra_kv_cache is not None and extra_topk_indices is not None:
        extra = (extra_kv_cache, extra_topk_indices, extra_topk_length, extra_block_size)
        scopes.append(extra)
    keys, counts = [], []
    for cache, slots, length, size in scopes:
        slots = slots.masked_fill((slots < 0) | (slots >= len(cache) * size), -1)
        if length is not None:
            position = torch.arange(slots.shape[-1], device=slots.device)
            slots = slots.masked_fill(position >= length[:, None, None], -1)
        keys.append(
            gather_and_dequantize(cache, slots, layout=layout, block_size=size, dtype=q.dtype)
        )
        counts.append(slots >= 0)
    kv, is_valid = torch.cat(keys, 2).float(), torch.cat(counts, 2)
    logits = torch.einsum("bshd,bskd->bshk", q.float(), kv) * softmax_scale
    logits = logits.masked_fill(~is_valid[:, :, None], -torch.inf)
    lse = logits.logsumexp(-1)
    total = lse if attn_sink is None else torch.logaddexp(lse, attn_sink)
    is_empty = lse == -torch.inf
    weights = torch.exp(logits - total.masked_fill(total == -torch.inf, 0.0)[..., None])
    out = torch.einsum("bshk,bskd->bshd", weights, kv[..., :value_dim])
    return out.to(q.dtype), lse.masked_fill(is_empty, empty_lse)


# Values of `torch.device.type` that the backend takes over without being named. An Ascend port
# would say {"npu"}; this example runs only where it is asked for.
device_types: frozenset[str] = frozenset()

operators = {
    "engram_causal_conv": engram_causal_conv_ref,
    "engram_causal_conv_backward": engram_causal_conv_backward_ref,
    "engram_gate": engram_gate_ref,
    "engram_gate_backward": engram_gate_backward_ref,
    "engram_gather": engram_gather_ref,
    "engram_hash": engram_hash_ref,
    "engram_row_adam": engram_row_adam_ref,
    "engram_sum_rows": engram_sum_rows_ref,
    "gather_and_dequantize": gather_and_dequantize_ref,
    "gather_rope": gather_rope_ref,
    "inverse_rope_gate": inverse_rope_gate_ref,
    "inverse_rope_gate_backward": inverse_rope_gate_backward_ref,
    "lightning_topk": lightning_topk_ref,
    "linear_cross_entropy": linear_cross_entropy_ref,
    "lowrank_attention": lowrank_attention_ref,
    "lowrank_remainder": lowrank_remainder_ref,
    "lowrank_topk": lowrank_topk_ref,
    "mha_prefill": mha_prefill_ref,
    "mha_prefill_backward": mha_prefill_backward_ref,
    "fp8_matmul": fp8_matmul_ref,
    "fp8_quantize": fp8_quantize_ref,
    "mhc_coefficients": mhc_coefficients_ref,
    "mhc_coefficients_backward": mhc_coefficients_backward_ref,
    "mhc_collapse": mhc_collapse_ref,
    "mhc_collapse_backward": mhc_collapse_backward_ref,
    "mhc_collapse_norm": mhc_collapse_norm_ref,
    "mhc_collapse_norm_backward": mhc_collapse_norm_backward_ref,
    "mhc_head": mhc_head_ref,
    "mhc_head_backward": mhc_head_backward_ref,
    "mhc_enter": mhc_enter_ref,
    "mhc_enter_backward": mhc_enter_backward_ref,
    "mhc_seam": mhc_seam_ref,
    "mhc_seam_backward": mhc_seam_backward_ref,
    "mhc_write_back": mhc_write_back_ref,
    "mhc_write_back_backward": mhc_write_back_backward_ref,
    "moe_experts": moe_experts_ref,
    "moe_experts_backward": moe_experts_backward_ref,
    "moe_experts_fp8": moe_experts_fp8_ref,
    "moe_route": moe_route_ref,
    "moe_route_backward": moe_route_backward_ref,
    "mhc_write_back_collapse_norm": mhc_write_back_collapse_norm_ref,
    "mhc_write_back_collapse_norm_backward": mhc_write_back_collapse_norm_backward_ref,
    "norm_rope_store": norm_rope_store_ref,
    "norm_rotate_tail_backward": norm_rotate_tail_backward_ref,
    "paged_decode": paged_decode_ref,
    "quantize_and_store": quantize_and_store_ref,
    "rms_norm": rms_norm_ref,
    "rms_norm_backward": rms_norm_backward_ref,
    "rotate_tail": rotate_tail_ref,
    "sparse_decode": sparse_decode,
    "sparse_prefill": sparse_prefill_ref,
    "sparse_prefill_backward": sparse_prefill_backward_ref,
    "swiglu": swiglu_ref,
    "swiglu_backward": swiglu_backward_ref,
}
