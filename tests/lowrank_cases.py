"""Calls of the selector, the remainder and their composite with everything that may be hostile.

Positions that no row of a request sees hold NaN, tables end in garbage, queries are slices of
larger tensors, some rows see nothing. The interpreter and the GPU run the same cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from sparse_decode_cases import DEVICE, DTYPE, SINKS, nan_cache, store, with_slack
from torch import Tensor

from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.ref import gather_and_dequantize_ref, gather_rope_ref
from model1.ops.selector.ref import request_slots
from model1.testing.compare import assert_close_rows

Kind = tuple[KVLayout, int, int, int]  # layout, h, r, block_size: what kernels are compiled for
LARGE_LENS = [(1,), (1, 1, 1), (2, 0, 5), (0, 7), (19, 1)]
SMALL_LENS = [(1,), (1, 0, 1), (0, 2)]
SCAN = (
    "scan_q", "index_cache", "kv_cache", "block_table", "cu_seqlens_q", "max_seqlen_q", "key_end",
    "core_count", "topk", "sliding_window", "max_seqlen", "layout", "block_size",
)  # fmt: skip
CHOICE = ("core_count", "topk", "sliding_window")  # of them those that say how many are chosen


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a call looks like; the numbers are drawn."""

    layout: KVLayout
    query_lens: tuple[int, ...] = (1, 0, 2)
    max_seqlen: int = 40
    h: int = 3
    r: int = 16
    block_size: int = 4
    topk: int = 12
    window: int = 3
    rotary_value: bool = True
    has_sink: bool = False


def make_arguments(shape: Shape, *, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Keyword arguments of `lowrank_attention`, and `scan_q` of the operators below it."""
    layout, size, d_nope = shape.layout, shape.block_size, shape.layout.d_nope
    b, t = len(shape.query_lens), sum(shape.query_lens)
    ends = [_row_ends(n, shape.max_seqlen) for n in shape.query_lens]
    blocks = -(-shape.max_seqlen // size)
    cache = nan_cache(b * blocks + 1, size, layout)
    index_dtype = torch.float32 if layout.name == "fp32" else torch.bfloat16
    index = torch.full((len(cache) * size, shape.r), math.nan, dtype=index_dtype, device=DEVICE)
    table = torch.randperm(b * blocks + 1, device=DEVICE)[: b * blocks].view(b, blocks).int()
    for i, end in enumerate(ends):
        slots = request_slots(table, i, max(end, default=0), size)
        store(cache, slots, layout, size)
        index[slots] = torch.randn(len(slots), shape.r).to(DEVICE, index_dtype)
        table[i, -(-max(end, default=0) // size) :] = _pick([-1, 2**31 - 1])
    key_end = torch.tensor([e for end in ends for e in end], dtype=torch.int32, device=DEVICE)
    count = torch.randint(shape.window, shape.topk + 1, (t,), dtype=torch.int32).to(DEVICE)
    basis = torch.linalg.qr(torch.randn(d_nope, shape.r))[0].T.contiguous().to(DEVICE)
    sink = torch.tensor([_pick(SINKS) for _ in range(shape.h)], device=DEVICE)
    q = torch.randn(t, shape.h, layout.d).clamp(-2, 2).to(DEVICE, dtype)
    return {
        "q": with_slack(q), "kv_cache": cache, "index_cache": index,
        "block_table": with_slack(table), "key_end": key_end, "core_count": count,
        "cu_seqlens_q": torch.tensor([0, *shape.query_lens], device=DEVICE).cumsum(0).int(),
        "max_seqlen_q": max([1, *shape.query_lens]), "basis": basis,
        "mean": (torch.randn(d_nope) / 4).to(DEVICE), "topk": shape.topk,
        "sliding_window": shape.window, "max_seqlen": shape.max_seqlen,
        "rotary_value": shape.rotary_value, "layout": layout, "block_size": size,
        "value_dim": layout.d if shape.rotary_value else d_nope,
        "softmax_scale": _pick([1.0, 4.0]) * layout.d**-0.5,
        "attn_sink": sink if shape.has_sink else None,
    }  # fmt: skip


def _row_ends(num_queries: int, max_seqlen: int) -> list[int]:
    """Keys of each row: causal, or any number in any order."""
    if _pick([True, True, False]):
        total = _integer(min(num_queries, max_seqlen), max_seqlen)
        return [max(0, total - num_queries + 1 + i) for i in range(num_queries)]
    return [_pick([0, 1, max_seqlen, _integer(0, max_seqlen)])] * num_queries


def _pick(options: Any) -> Any:
    return options[_integer(0, len(options) - 1)]


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def projected(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The composite's own scan_q and offset."""
    from model1.ops.lowrank_attention.portable import scan_queries

    q = arguments["q"]
    basis, mean = (arguments[x].to(q.dtype) for x in ("basis", "mean"))
    return scan_queries(q, basis, mean, arguments["softmax_scale"])


def scan_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `lowrank_topk` takes, queries as the composite projects them."""
    scan = {name: arguments[name] for name in SCAN if name != "scan_q"}
    return scan | {"scan_q": projected(arguments)[0]}


def store_projections(arguments: dict[str, Any]) -> None:
    """The index cache gets what it holds in a model, basis (latent - mean), of every seen token."""
    basis, mean = arguments["basis"].double(), arguments["mean"].double()
    layout, size = arguments["layout"], arguments["block_size"]
    for row, request in enumerate(request_of(arguments)):
        end = max(0, int(arguments["key_end"][row]))
        slots = request_slots(arguments["block_table"], request, end, size)
        latents = gather_and_dequantize_ref(
            arguments["kv_cache"], slots, layout=layout, block_size=size, dtype=torch.float64
        )
        z = (latents[:, : layout.d_nope] - mean) @ basis.T
        arguments["index_cache"][slots] = z.to(arguments["index_cache"].dtype)


def every_key(arguments: dict[str, Any]) -> Tensor:
    """The core that leaves nothing out, [t, max_seqlen]."""
    key = torch.arange(arguments["max_seqlen"], device=DEVICE)[None]
    return torch.where(key < arguments["key_end"][:, None], key, -1)


def request_of(arguments: dict[str, Any]) -> list[int]:
    """The request of every row."""
    lens = arguments["cu_seqlens_q"].diff().tolist()
    return [i for i, n in enumerate(lens) for _ in range(n)]


def row_keys(arguments: dict[str, Any], row: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Slots, z, rotary keys of what a row sees, in fp64 after rounding to `dtype`."""
    layout, size = arguments["layout"], arguments["block_size"]
    num_keys = max(0, int(arguments["key_end"][row]))
    slots = request_slots(arguments["block_table"], request_of(arguments)[row], num_keys, size)
    rope = gather_rope_ref(
        arguments["kv_cache"], slots, layout=layout, block_size=size, dtype=dtype
    )
    return slots, arguments["index_cache"][slots].to(dtype).double(), rope.double()


def assert_good_choice(chosen: Tensor, lse: Tensor, scan: dict[str, Any]) -> None:
    """A window, then the largest votes, in fp64; distinct, -1 behind, as many as asked for."""
    scan_q = scan["scan_q"]
    assert chosen.shape == (len(scan_q), scan["topk"])
    for row in range(len(scan_q)):
        _, z, rope = row_keys(scan, row, scan_q.dtype)
        num_keys = len(z)
        count = min(int(scan["core_count"][row]), num_keys)
        got = chosen[row, :count].long()
        assert (chosen[row, count:] == -1).all()
        assert len(got.unique()) == count
        assert ((got >= 0) & (got < num_keys)).all()
        logits = scan_q[row].double() @ torch.cat([z, rope], 1).T
        want = logits.logsumexp(-1) if num_keys else logits.new_full(logits.shape[:1], -math.inf)
        assert_close_rows(lse[row][:, None], want[:, None], want[:, None])
        votes = logits.softmax(-1).sum(0)
        is_chosen = torch.zeros(num_keys, dtype=torch.bool, device=votes.device)
        is_chosen[got] = True
        first = max(0, num_keys - scan["sliding_window"])
        assert is_chosen[first:].all()
        inside, outside = votes[:first][is_chosen[:first]], votes[:first][~is_chosen[:first]]
        if len(inside) and len(outside):
            assert inside.min() >= outside.max() * (1 - 1e-3) - 1e-12, f"row {row}"


def rest_expected(scan: dict[str, Any], core: Tensor, rotary: bool) -> tuple[Tensor, ...]:
    """The remainder in fp64, as plain PyTorch in scan_q's dtype has it, lse and the noise."""
    scan_q = scan["scan_q"]
    dtype, rank = scan_q.dtype, scan["index_cache"].shape[1]
    width = scan_q.shape[2] if rotary else rank
    out = scan_q.new_zeros(*scan_q.shape[:2], width, dtype=torch.float64)
    baseline, lse = out.clone(), scan_q.new_full(scan_q.shape[:2], -math.inf, dtype=torch.float64)
    noise, u = torch.zeros_like(lse), torch.finfo(dtype).eps / 2
    for row in range(len(scan_q)):
        _, z, rope = row_keys(scan, row, dtype)
        is_rest = torch.ones(len(z), dtype=torch.bool, device=z.device)
        inside = core[row][(core[row] >= 0) & (core[row] < len(z))].long()
        is_rest[inside] = False
        keys = torch.cat([z, rope], 1)[is_rest]
        if len(keys) == 0:
            continue
        logits = scan_q[row].double() @ keys.T
        lse[row] = logits.logsumexp(-1)
        weights, values = logits.softmax(-1), keys[:, :width]
        out[row] = weights @ values
        baseline[row] = (weights.to(dtype).double() @ values).to(dtype).double()
        noise[row] = u * (weights.square() @ values.square().sum(-1)).sqrt()
    return out, baseline, lse, noise


def attention_expected(
    arguments: dict[str, Any], core: Tensor, *, is_baseline: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The composite's formula for a given core: out, lse and the noise of each row.

    The baseline rounds what plain PyTorch rounds; the noise is what the rounding of the weights
    alone does, about 2.4 standard deviations: where few keys count a baseline has none by luck.

    The rounded queries of the scan are those of the kernel: their error dominates, and another
    draw of it would be no measure.
    """
    q, layout = arguments["q"], arguments["layout"]
    dtype = q.dtype if is_baseline else torch.float64
    basis, mean = (arguments[x].to(q.dtype).to(dtype) for x in ("basis", "mean"))
    scale, d_nope, value_dim = arguments["softmax_scale"], layout.d_nope, arguments["value_dim"]
    x = q.to(dtype)
    scan_q = torch.cat([x[..., :d_nope] @ basis.T, x[..., d_nope:]], dim=-1) * scale
    offset = (x[..., :d_nope] @ mean).double() * scale
    if is_baseline:
        scan_q, offset = projected(arguments)
    out = q.new_zeros(*q.shape[:2], value_dim, dtype=dtype)
    lse = q.new_full(q.shape[:2], -math.inf, dtype=torch.float64)
    noise, sink = torch.zeros_like(lse), arguments["attn_sink"]
    for row in range(len(q)):
        slots, z, rope = row_keys(arguments, row, q.dtype)
        if len(slots) == 0:
            continue
        inside = core[row][core[row] >= 0].long()
        is_rest = torch.ones(len(slots), dtype=torch.bool, device=z.device)
        is_rest[inside] = False
        k = gather_and_dequantize_ref(
            arguments["kv_cache"], slots[inside], layout=layout,
            block_size=arguments["block_size"], dtype=q.dtype,
        ).double()  # fmt: skip
        z, rope = z[is_rest], rope[is_rest]
        rest_logits = scan_q[row].double() @ torch.cat([z, rope], 1).T + offset[row][:, None]
        logits = torch.cat([q[row].double() @ k.T * scale, rest_logits], 1)
        lse[row] = logits.logsumexp(-1)
        total = lse[row] if sink is None else torch.logaddexp(lse[row], sink.double())
        weights = torch.exp(logits - total[:, None]).to(dtype).double()
        core_out = (weights[:, : len(k)] @ k[:, :value_dim]).to(dtype)
        summed = (weights[:, len(k) :] @ torch.cat([z, rope], 1)).to(dtype)
        mass = weights[:, len(k) :].sum(-1, keepdim=True).to(dtype)
        nope = summed[:, : len(basis)] @ basis + mass * mean
        rest = torch.cat([nope, summed[:, len(basis) :]], 1)[:, :value_dim]
        out[row] = core_out + rest
        rest_values = torch.cat([z @ basis.double() + mean.double(), rope], 1)
        sizes = torch.cat([k[:, :value_dim], rest_values[:, :value_dim]]).square().sum(-1)
        noise[row] = torch.finfo(q.dtype).eps / 2 * (weights.square() @ sizes).sqrt()
    return out.double(), lse, noise


def draw_shape(number: int, kinds: list[Kind], *, is_large: bool) -> Shape:
    """A shape from its number, which seeds what `make_arguments` draws too; few kernels compile."""
    torch.manual_seed(number)
    layout, h, r, block_size = _pick(kinds)
    topk = _pick([64, 512] if is_large else [1, 5, 12])
    return Shape(
        layout=layout,
        query_lens=_pick(LARGE_LENS if is_large else SMALL_LENS),
        max_seqlen=_pick([65, 700, 3000] if is_large else [1, 23, 40]),
        h=h,
        r=r,
        block_size=block_size,
        topk=topk,
        window=_pick([0, 1, topk // 4]),
        rotary_value=_pick([True, False]),
        has_sink=_pick([True, False]),
    )
