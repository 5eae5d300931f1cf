"""Calls of the Hopper kernels, for `call_cases`; where those cannot run they are skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import paged_decode_cases
import sparse_decode_cases
import sparse_prefill_cases
import torch
from calls import Call, call_of, set_seed
from sparse_decode_cases import DEVICE

from model1.ops.kv_cache import KVLayout
from model1.ops.paged_decode import paged_decode
from model1.ops.sparse_decode import sparse_decode
from model1.ops.sparse_prefill import sparse_prefill

MODEL1, BF16 = KVLayout("model1_fp8", 448, 64), KVLayout("bf16", 512, 64)


def _sparse_prefill(seed: int) -> Call:
    set_seed(seed)
    shape = sparse_prefill_cases.Shape(t=9, h=64, s=300, topk=100, d=512, value_dim=512)
    arguments = sparse_prefill_cases.make_arguments(shape, dtype=torch.bfloat16)
    options = {"deterministic": True}
    return call_of(
        sparse_prefill, arguments | options, "q", "kv", "attn_sink", backend="hopper"
    )  # fmt: skip


def _sparse_prefill_backward(seed: int) -> Call:
    set_seed(seed)
    shape = sparse_prefill_cases.Shape(t=9, h=65, s=300, topk=100, d=576, value_dim=512)
    arguments = sparse_prefill_cases.make_arguments(shape, dtype=torch.bfloat16)
    out, _, lse = sparse_prefill(**arguments, backend="hopper")
    names = ("q", "kv", "topk_indices", "topk_length", "attn_sink")
    tensors = {"dout": torch.randn(out.shape).to(out)} | {x: arguments[x] for x in names}
    scale = arguments["softmax_scale"]

    def run(**tensors: torch.Tensor) -> Any:
        operator = torch.ops.model1.sparse_prefill_backward
        return operator(*tensors.values(), scale, True, "hopper")

    return Call(run=run, tensors=tensors | {"out": out, "lse": lse})


def _sparse_decode(layout: KVLayout) -> Callable[[int], Call]:
    def build(seed: int) -> Call:
        set_seed(seed)
        shape = sparse_decode_cases.Shape(
            layout=layout, b=3, h=64, topk=128, block_size=64, extra_topk=256, extra_block_size=2,
            value_dim=512, has_length=True, has_sink=True,
        )  # fmt: skip
        arguments = sparse_decode_cases.make_arguments(shape, dtype=torch.bfloat16)
        return call_of(sparse_decode, arguments, backend="hopper")

    return build


def _paged_decode(**options: Any) -> Callable[[int], Call]:
    def build(seed: int) -> Call:
        shape = paged_decode_cases.Shape(
            h=64, value_dim=512, block_size=64, dtype=torch.bfloat16, causal=True, has_sink=True,
            **options,
        )  # fmt: skip
        case = paged_decode_cases.random_case(shape, [500, 40], [2, 2], seed)
        arguments = case.arguments(DEVICE)
        arguments["cache_seqlens"].copy_(torch.tensor([[500, 40], [3, 0], [257, 39]][seed]))
        return call_of(paged_decode, arguments, backend="hopper")

    return build


HOPPER_CALLS: dict[str, Callable[[int], Call]] = {
    "sparse_prefill hopper": _sparse_prefill,
    "sparse_prefill_backward hopper": _sparse_prefill_backward,
    "sparse_decode hopper": _sparse_decode(MODEL1),
    "sparse_decode hopper bf16": _sparse_decode(BF16),
    "paged_decode hopper": _paged_decode(d=576),
    "paged_decode hopper fp8": _paged_decode(d=512, layout=MODEL1),
}
