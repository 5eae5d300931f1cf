"""One call of every operator of the library, for tests that ask the same of all of them.

`CALLS` maps a name to a builder, which takes a seed: calls of one name differ in values, lengths
and indices, not in shapes and numbers, so that the inputs of one may be copied into another's.
Small on a CPU, of the models' widths on a GPU, on whichever GPU is the current one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import call_cases_loss
import lowrank_cases
import mha_prefill_cases
import paged_decode_cases
import small_cases
import sparse_decode_cases
import sparse_prefill_cases
import torch
from call_cases_hopper import HOPPER_CALLS
from call_cases_memory import MEMORY_CALLS
from calls import Call, call_of, set_seed
from expert_calls import fp8_linear_call, moe_experts_call, moe_route_call
from lightning_cases import make_call
from sparse_decode_cases import DEVICE, DTYPE
from torch import Tensor

from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    gather_rope,
    quantize_and_store,
)
from model1.ops.kv_write import norm_rope_store
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.mha_prefill import mha_prefill
from model1.ops.paged_decode import paged_decode
from model1.ops.rope import Rotation, rope_frequencies, rotation
from model1.ops.rope_gate import inverse_rope_gate
from model1.ops.selector import lightning_topk, lowrank_topk
from model1.ops.sparse_decode import sparse_decode
from model1.ops.sparse_prefill import sparse_prefill

BIG = DEVICE == "cuda"
LAYOUT = KVLayout("model1_fp8", 448, 64) if BIG else KVLayout("model1_fp8", 64, 32)
BLOCK_SIZE = 64 if BIG else 4
HEADS = 64 if BIG else 2


def _whole_blocks(cache: Tensor, layout: KVLayout, block_size: int) -> Tensor:
    """The same blocks as `allocate_kv_cache` places them, which a copy of a slice would not be."""
    whole = allocate_kv_cache(len(cache), block_size, layout, cache.device)
    whole[:, : cache.shape[1]] = cache
    return whole


def _filled_cache(num_blocks: int) -> Tensor:
    """Random tokens in every slot."""
    cache = allocate_kv_cache(num_blocks, BLOCK_SIZE, LAYOUT, DEVICE)
    num_slots = num_blocks * BLOCK_SIZE
    kv, slots = torch.randn(num_slots, LAYOUT.d).to(DEVICE), torch.arange(num_slots, device=DEVICE)
    quantize_and_store(kv, cache, slots, layout=LAYOUT, block_size=BLOCK_SIZE, backend="ref")
    return cache


def _slots(t: int, num_blocks: int) -> Tensor:
    """Distinct slots, the second of them none."""
    slots = torch.randperm(num_blocks * BLOCK_SIZE)[:t]
    slots[1] = -1
    return slots.to(DEVICE)


def _angles(t: int, d_rope: int) -> dict[str, Tensor]:
    angles = rotation(torch.randint(0, 100000, (t,)), rope_frequencies(d_rope, 10000.0))
    return {"cos": angles.cos.to(DEVICE), "sin": angles.sin.to(DEVICE)}


def _sparse_decode(seed: int, *, deterministic: bool = False) -> Call:
    """Rows so few are split over programs; deterministic ones by their length alone."""
    set_seed(seed)
    extra_topk = 1500 if deterministic else 256  # with the others more keys than a fixed split has
    shape = sparse_decode_cases.Shape(
        layout=LAYOUT, b=3, h=HEADS, topk=128 if BIG else 20, block_size=BLOCK_SIZE,
        extra_topk=extra_topk if BIG else 9, extra_block_size=2, has_length=True, has_sink=True,
    )  # fmt: skip
    arguments = sparse_decode_cases.make_arguments(shape)
    for prefix in ("", "extra_"):
        cache, block_size = arguments[f"{prefix}kv_cache"], arguments[f"{prefix}block_size"]
        arguments[f"{prefix}kv_cache"] = _whole_blocks(cache, LAYOUT, block_size)
    return call_of(sparse_decode, arguments | {"deterministic": deterministic})


def _paged_decode(seed: int) -> Call:
    sizes = {"d": 576, "value_dim": 512, "block_size": 64, "dtype": torch.bfloat16}
    small = {"d": 24, "value_dim": 16, "block_size": 16}
    shape = paged_decode_cases.Shape(h=8, causal=True, has_sink=True, **(sizes if BIG else small))
    case = paged_decode_cases.random_case(shape, [500, 40], [2, 2], seed)
    arguments = case.arguments(DEVICE)
    arguments["cache_seqlens"].copy_(torch.tensor([[500, 40], [3, 0], [257, 39]][seed]))
    return call_of(paged_decode, arguments)


def _sparse_prefill_arguments(seed: int) -> dict[str, Any]:
    set_seed(seed)
    sizes = {"t": 9, "h": HEADS, "s": 300, "topk": 100, "d": 512, "value_dim": 512}
    return sparse_prefill_cases.make_arguments(sparse_prefill_cases.Shape(**(sizes if BIG else {})))


def _sparse_prefill(seed: int) -> Call:
    arguments = _sparse_prefill_arguments(seed) | {"deterministic": True}
    return call_of(sparse_prefill, arguments, "q", "kv", "attn_sink")


def _sparse_prefill_backward(seed: int) -> Call:
    arguments = _sparse_prefill_arguments(seed)
    out, _, lse = sparse_prefill(**arguments, backend="triton")
    dout = torch.randn(out.shape).to(out)
    names = ("q", "kv", "topk_indices", "topk_length", "attn_sink")
    tensors = {"dout": dout, **{name: arguments[name] for name in names}, "out": out, "lse": lse}
    scale = arguments["softmax_scale"]

    def run(**tensors: Tensor) -> Any:
        operator = torch.ops.model1.sparse_prefill_backward
        return operator(*tensors.values(), scale, True, "triton")

    return Call(run=run, tensors=tensors)


def _mha_case(seed: int) -> tuple[mha_prefill_cases.Case, dict[str, Any]]:
    """Three requests whose lengths have the same sum and at most the same maximum."""
    q_lengths = [[17, 0, 9], [3, 17, 6], [9, 9, 8]][seed]
    k_lengths = [[20, 4, 5], [9, 20, 0], [0, 20, 9]][seed]
    sizes = {"h": 8, "hkv": 4, "d": 192, "dv": 128, "dtype": torch.bfloat16}
    small = {"h": 2, "hkv": 1, "d": 24, "dv": 16}
    shape = mha_prefill_cases.Shape(causal=True, **(sizes if BIG else small))
    case = mha_prefill_cases.random_case(shape, q_lengths, k_lengths, seed, DEVICE)
    arguments = case.arguments() | {"max_seqlen_q": 17, "max_seqlen_k": 20}
    return case, arguments | {name: arguments[name].detach() for name in "qkv"}


def _mha_prefill(seed: int) -> Call:
    return call_of(mha_prefill, _mha_case(seed)[1], "q", "k", "v")


def _mha_prefill_backward(seed: int) -> Call:
    case, arguments = _mha_case(seed)
    out, lse = mha_prefill(**arguments, backend="triton")
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    tensors = {"d_out": case.d_out, **{name: arguments[name] for name in names}}
    scale = arguments["softmax_scale"]

    def run(**tensors: Tensor) -> Any:
        operator = torch.ops.model1.mha_prefill_backward
        return operator(*tensors.values(), 17, 20, scale, True, "triton")

    return Call(run=run, tensors=tensors | {"out": out, "lse": lse})


def _lowrank_arguments(seed: int) -> dict[str, Any]:
    set_seed(seed)
    sizes = {"max_seqlen": 3000, "r": 64, "topk": 64, "window": 16} if BIG else {}
    shape = lowrank_cases.Shape(
        layout=LAYOUT, query_lens=(1, 1, 1), h=HEADS, block_size=BLOCK_SIZE, has_sink=True, **sizes
    )
    arguments = lowrank_cases.make_arguments(shape)
    arguments["kv_cache"] = _whole_blocks(arguments["kv_cache"], LAYOUT, BLOCK_SIZE)
    return arguments | {"softmax_scale": LAYOUT.d**-0.5}


def _lowrank_attention(seed: int) -> Call:
    return call_of(lowrank_attention, _lowrank_arguments(seed))


def _lowrank_topk(seed: int) -> Call:
    return call_of(lowrank_topk, lowrank_cases.scan_arguments(_lowrank_arguments(seed)))


def _lowrank_remainder(seed: int) -> Call:
    scan = lowrank_cases.scan_arguments(_lowrank_arguments(seed))
    core, _ = lowrank_topk(**scan, backend="triton")
    rest = {name: x for name, x in scan.items() if name not in lowrank_cases.CHOICE}
    return call_of(lowrank_remainder, rest | {"core_indices": core, "rotary_value": True})


def _lightning_topk(seed: int) -> Call:
    set_seed(seed)
    sizes = (128, 3000, 64, 512) if BIG else (16, 40, 4, 9)
    return call_of(lightning_topk, make_call((1, 1, 1), HEADS, *sizes))


def _norm_rope_store(seed: int) -> Call:
    set_seed(seed)
    options = {
        "layout": LAYOUT, "block_size": BLOCK_SIZE, "eps": 1e-6, "norm_width": LAYOUT.d,
        "backend": "triton",
    }  # fmt: skip
    tensors = {
        "kv": torch.randn(5, LAYOUT.d).to(DEVICE, DTYPE),
        "norm_weight": (torch.rand(LAYOUT.d) + 0.5).to(DEVICE), **_angles(5, LAYOUT.d_rope),
        "kv_cache": _filled_cache(3), "slot_mapping": _slots(5, 3),
    }  # fmt: skip

    def run(cos: Tensor, sin: Tensor, **tensors: Tensor) -> Any:
        return norm_rope_store(**tensors, rotation=Rotation(cos, sin), **options)

    return Call(run=run, tensors=tensors)


def _quantize_and_store(seed: int) -> Call:
    set_seed(seed)
    kv = torch.randn(5, LAYOUT.d).to(DEVICE)
    tensors = {"kv": kv, "kv_cache": _filled_cache(3), "slot_mapping": _slots(5, 3)}
    return call_of(quantize_and_store, tensors | {"layout": LAYOUT, "block_size": BLOCK_SIZE})


def _gather(seed: int) -> Call:
    """All channels and the rotary ones alone."""
    set_seed(seed)
    options = {"layout": LAYOUT, "block_size": BLOCK_SIZE, "backend": "triton"}

    def run(kv_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        everything = gather_and_dequantize(kv_cache, slots, **options, dtype=torch.bfloat16)
        return everything, gather_rope(kv_cache, slots, **options)

    return Call(run=run, tensors={"kv_cache": _filled_cache(3), "slots": _slots(6, 3).view(2, 3)})


def _gate_tensors(seed: int) -> dict[str, Tensor]:
    set_seed(seed)
    out = torch.randn(5, HEADS, LAYOUT.d).to(DEVICE, DTYPE)
    return {"out": out, **_angles(5, LAYOUT.d_rope), "gate": torch.randn(5, HEADS).to(DEVICE)}


def _inverse_rope_gate(seed: int) -> Call:
    def run(out: Tensor, cos: Tensor, sin: Tensor, gate: Tensor) -> Tensor:
        d_rope = cos.shape[1]
        return inverse_rope_gate(out, Rotation(cos, sin), gate, d_rope=d_rope, backend="triton")

    return Call(run=run, tensors=_gate_tensors(seed), differentiable=("out", "gate"))


def _inverse_rope_gate_backward(seed: int) -> Call:
    def run(**tensors: Tensor) -> Any:
        return torch.ops.model1.inverse_rope_gate_backward(*tensors.values(), "triton")

    tensors = _gate_tensors(seed)
    return Call(
        run=run, tensors={"grad": torch.randn(tensors["out"].shape).to(tensors["out"])} | tensors
    )


CALLS: dict[str, Callable[[int], Call]] = {
    "sparse_decode": _sparse_decode,
    "sparse_decode deterministic": lambda seed: _sparse_decode(seed, deterministic=True),
    "sparse_prefill": _sparse_prefill,
    "sparse_prefill_backward": _sparse_prefill_backward,
    "paged_decode": _paged_decode,
    "mha_prefill": _mha_prefill,
    "mha_prefill_backward": _mha_prefill_backward,
    "lowrank_topk": _lowrank_topk,
    "lowrank_remainder": _lowrank_remainder,
    "lowrank_attention": _lowrank_attention,
    "lightning_topk": _lightning_topk,
    "norm_rope_store": _norm_rope_store,
    "quantize_and_store": _quantize_and_store,
    "gather": _gather,
    "inverse_rope_gate": _inverse_rope_gate,
    "inverse_rope_gate_backward": _inverse_rope_gate_backward,
    "fp8_linear": lambda seed: Call(**fp8_linear_call(seed)),
    "moe_route": lambda seed: Call(**moe_route_call(seed)),
    "moe_experts": lambda seed: Call(**moe_experts_call("triton")(seed)),
    "moe_experts auto": lambda seed: Call(**moe_experts_call("auto")(seed)),
}  # fmt: skip


def _from_parts(build: Callable[[int], dict[str, Any]]) -> Callable[[int], Call]:
    return lambda seed: Call(**build(seed))


CALLS |= {name: _from_parts(build) for name, build in small_cases.PARTS.items()}
CALLS |= MEMORY_CALLS | HOPPER_CALLS
CALLS |= {name: _from_parts(build) for name, build in call_cases_loss.PARTS.items()}
