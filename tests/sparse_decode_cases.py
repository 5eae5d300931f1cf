"""Sparse decode calls with everything that may be hostile, and the same in double precision.

Slots that no valid entry names hold NaN, entries behind a row's length are garbage, queries, lists
and blocks are slices of larger tensors. The interpreter and the GPU run the same cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model1.ops.kv_cache import KVLayout
from model1.ops.kv_cache.ref import gather_and_dequantize_ref, quantize_and_store_ref
from model1.ops.launch import device_target
from model1.ops.sparse_decode import sparse_decode
from model1.testing.compare import assert_close_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cannot multiply 16-bit numbers.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
GARBAGE_SLOTS = (-(2**31), -7, 2**30, 2**31 - 1)
SINKS = (math.inf, -math.inf, 0.5, -3.0, 40.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a call looks like; the numbers are drawn."""

    layout: KVLayout
    b: int = 2
    s_q: int = 1
    h: int = 3
    topk: int = 20
    block_size: int = 4
    extra_topk: int = 0
    extra_block_size: int = 1
    value_dim: int | None = None  # None: all channels
    has_length: bool = False
    has_sink: bool = False


def make_arguments(shape: Shape, *, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Keyword arguments of `sparse_decode`."""
    layout, rows = shape.layout, (shape.b, shape.s_q)
    q = torch.randn(*rows, shape.h, layout.d).clamp(-1, 1).to(DEVICE, dtype)
    cache, slots, length = _scope(shape, shape.topk, shape.block_size)
    extra = _scope(shape, shape.extra_topk, shape.extra_block_size) if shape.extra_topk else None
    sink = torch.tensor([random.choice(SINKS) for _ in range(shape.h)], device=DEVICE)
    return {
        "q": with_slack(q), "kv_cache": cache, "topk_indices": slots, "topk_length": length,
        "extra_kv_cache": extra and extra[0], "extra_topk_indices": extra and extra[1],
        "extra_topk_length": extra and extra[2], "extra_block_size": shape.extra_block_size,
        "attn_sink": sink if shape.has_sink else None,
        "layout": layout, "block_size": shape.block_size, "value_dim": shape.value_dim or layout.d,
        "softmax_scale": layout.d**-0.5, "empty_lse": math.inf,
    }  # fmt: skip


def _scope(shape: Shape, topk: int, block_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    b, s_q = shape.b, shape.s_q
    num_blocks = -(-(2 * topk + 3) // block_size)
    cache = nan_cache(num_blocks, block_size, shape.layout)
    order = torch.rand(b, s_q, num_blocks * block_size).argsort(-1)
    slots = order[..., :topk].int().masked_fill_(torch.rand(b, s_q, topk) < 0.2, -1)
    length = torch.randint(topk + 1, (b,), dtype=torch.int32)
    length[0] = random.choice([0, 1, topk])
    counted = slots
    if shape.has_length:
        behind = torch.arange(topk) >= length[:, None, None]
        counted = slots.masked_fill(behind, -1)
        garbage = torch.tensor(GARBAGE_SLOTS)[torch.randint(len(GARBAGE_SLOTS), slots.shape)].int()
        slots = torch.where(behind, garbage, slots)
    store(cache, counted[counted >= 0].unique(), shape.layout, block_size)
    used = length.to(DEVICE) if shape.has_length else None
    return cache, with_slack(slots.to(DEVICE)), used


def nan_cache(num_blocks: int, block_size: int, layout: KVLayout) -> Tensor:
    """Blocks that are all NaN, further apart than they have to be, by no whole number of rows."""
    step = layout.block_step_bytes
    stride = (-(-layout.block_bytes(block_size) // step) + 2) * step
    cache = torch.full((num_blocks, stride), 0xFF, dtype=torch.uint8, device=DEVICE)
    return cache[:, : layout.block_bytes(block_size)]


def store(cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int) -> None:
    """Random tokens at `slots`; V3.2's scales are no powers of two."""
    if len(slots) == 0:
        return
    slots = slots.to(DEVICE)
    kv = (torch.randn(len(slots), layout.d) / 2).to(DEVICE)
    quantize_and_store_ref(kv, cache, slots, layout=layout, block_size=block_size)
    if layout.name == "v32_fp8":
        stretch_scales(cache, slots, layout, block_size)


def stretch_scales(cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int) -> None:
    """Make the scales of V3.2 tokens what other writers store, which are no powers of two."""
    start = slots // block_size * cache.stride(0) + slots % block_size * layout.row_bytes
    field = torch.arange(4 * layout.num_tiles, device=cache.device) + layout.d_nope
    at = (start[:, None] + field).long()
    flat = cache.as_strided((int(at.max()) + 1,), (1,))
    scale = flat[at].view(torch.float32) * (1 + torch.rand(1).item())
    flat[at] = scale.view(torch.uint8)


def with_slack(x: Tensor) -> Tensor:
    """The same values in a slice of a larger tensor."""
    larger = x.new_full([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16], 77)
    return larger[tuple(slice(n) for n in x.shape)].copy_(x)


def expected(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """out in fp64, out as plain PyTorch in q's dtype has it, and lse (-inf without keys)."""
    q, layout = arguments["q"], arguments["layout"]
    dtype, value_dim, sink = q.dtype, arguments["value_dim"], arguments["attn_sink"]
    keys, valid = [], []
    for prefix in ("", "extra_"):
        slots, length = (arguments[f"{prefix}topk_{what}"] for what in ("indices", "length"))
        if slots is None:
            continue
        if length is not None:
            behind = torch.arange(slots.shape[-1], device=DEVICE) >= length[:, None, None]
            slots = slots.masked_fill(behind, -1)
        cache, block_size = arguments[f"{prefix}kv_cache"], arguments[f"{prefix}block_size"]
        keys.append(
            gather_and_dequantize_ref(
                cache, slots, layout=layout, block_size=block_size, dtype=dtype
            )
        )
        valid.append(slots >= 0)
    k, is_valid = torch.cat(keys, 2).double(), torch.cat(valid, 2)
    logits = torch.einsum("bshd,bsnd->bshn", q.double(), k) * arguments["softmax_scale"]
    logits = logits.masked_fill(~is_valid[:, :, None], -math.inf)
    lse = logits.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double())
    weights = torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None])
    v = k[..., :value_dim]
    out = torch.einsum("bshn,bsnd->bshd", weights, v)
    rounded = torch.einsum("bshn,bsnd->bshd", weights.to(dtype).double(), v).to(dtype)
    return out, rounded, lse


def assert_right(got: tuple[Tensor, Tensor], arguments: dict[str, Any]) -> None:
    """Both results of a call against double precision; rows without keys to the bit."""
    out, lse = got
    want_out, baseline, want_lse = expected(arguments)
    is_empty = want_lse == -math.inf
    want_lse = want_lse.masked_fill(is_empty, arguments["empty_lse"])
    assert out.dtype == arguments["q"].dtype
    assert lse.dtype == torch.float32
    assert_close_rows(out, baseline, want_out)
    assert_close_rows(lse[..., None], want_lse[..., None], want_lse[..., None])
    assert not out[is_empty].any()


def run(arguments: dict[str, Any], split_tiles: int | None = None, **options: Any) -> Any:
    """The Triton kernel, with rows cut into splits of that many tiles."""
    if split_tiles is None:
        return sparse_decode(**arguments, backend="triton", **options)
    from model1.ops.sparse_decode.portable import choose_config, sparse_decode_triton

    q = arguments["q"]
    config = choose_config(device_target(q.device), q.shape[2], q.dtype, arguments["layout"])
    config = replace(config, split_tiles=split_tiles)
    return sparse_decode_triton(**arguments, deterministic=False, config=config)


def pick(arguments: dict[str, Any], requests: list[int]) -> dict[str, Any]:
    """The call of some of the requests."""
    per_request = ("q", "topk_indices", "topk_length", "extra_topk_indices", "extra_topk_length")
    picked = {n: arguments[n] for n in per_request if arguments[n] is not None}
    return arguments | {n: x[requests].clone() for n, x in picked.items()}


def padded(arguments: dict[str, Any], more: int, extra_more: int) -> dict[str, Any]:
    """The call with longer lists, whose new entries are no slots."""
    call = dict(arguments)
    for name, n in (("topk_indices", more), ("extra_topk_indices", extra_more)):
        slots = arguments[name]
        if slots is not None:
            ignored = torch.tensor([-1, *GARBAGE_SLOTS], device=DEVICE).int()
            tail = ignored[torch.randint(len(ignored), (*slots.shape[:2], n))]
            call[name] = torch.cat([slots, tail], -1)
    return call


def check_batch_invariance(
    arguments: dict[str, Any], run: Callable[[dict[str, Any]], tuple[Tensor, Tensor]]
) -> None:
    """A row has the same bits with other mates, in another order, in longer lists.

    The first row ends early, so that most of its list is padding already.
    """
    arguments["topk_indices"][0, 0, 3:] = -1
    want = run(arguments)
    assert_right(want, arguments)
    many = 1500 if DEVICE == "cuda" else 60  # as many as a split has keys, and more
    calls = [
        (order, padded(pick(arguments, order), *more))
        for order, more in (([3, 0, 2, 1], (0, 0)), ([2, 0], (1, 70)), ([0, 1, 1], (many, 0)))
    ]
    for order, call in calls:
        for got, whole in zip(run(call), want, strict=True):
            assert torch.equal(got, whole[order]), f"{order}, {call['topk_indices'].shape}"


def check_random_case(
    number: int, layouts: list[KVLayout], heads: list[int], topks: list[int], bs: list[int],
    call: Callable[[dict[str, Any]], tuple[Tensor, Tensor]] | None = None,
) -> None:  # fmt: skip
    """Draw a call from its number, run it and compare; the message names the number.

    call: what runs it, if not the portable kernel.
    """
    random.seed(number)
    torch.manual_seed(number)
    layout, has_second, has_length = (
        random.choice(layouts), random.random() < 0.5, random.random() < 0.5
    )  # fmt: skip
    shape = Shape(
        layout=layout,
        b=random.choice(bs),
        s_q=random.choice([1, 2, 3]),
        h=random.choice(heads),
        topk=random.choice(topks),
        block_size=random.choice([1, 2, 53, 61, 64]),
        extra_topk=random.choice(topks) if has_second else 0,
        extra_block_size=random.choice([1, 2, 53, 61, 64]),
        value_dim=layout.d_nope if layout.name == "v32_fp8" or layout.d > 512 else layout.d,
        has_length=has_length,
        has_sink=has_length,
    )
    split_tiles = random.choice([None, None, 1, 3])
    try:
        arguments = make_arguments(shape)
        got = run(arguments, split_tiles) if call is None else call(arguments)
        assert_right(got, arguments)
    except AssertionError as error:
        raise AssertionError(
            f"case {number}, {shape}, split_tiles {split_tiles}: {error}"
        ) from None
