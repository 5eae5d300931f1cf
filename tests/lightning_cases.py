"""Calls of the lightning indexer with everything that may be hostile, and the check in fp64."""

from __future__ import annotations

from typing import Any

import torch
from sparse_decode_cases import DEVICE
from torch import Tensor

from model1.ops.selector.ref import request_slots


def make_call(
    query_lens: tuple[int, ...], h: int, d: int, max_seqlen: int, block_size: int, topk: int
) -> dict[str, Any]:
    """Arguments of `lightning_topk`; NaN in unused slots, garbage in unused table entries."""
    b, t, blocks = len(query_lens), sum(query_lens), -(-max_seqlen // block_size)
    table = torch.randperm(b * blocks + 1)[: b * blocks].view(b, blocks).int()
    key_end = torch.randint(max_seqlen + 1, (t,), dtype=torch.int32)
    codes = torch.full(((b * blocks + 1) * block_size, d), 0x7F, dtype=torch.uint8)
    scale = torch.full((len(codes),), float("nan"))
    first = 0
    for i, n in enumerate(query_lens):
        end = max(key_end[first : first + n].tolist(), default=0)
        slots = request_slots(table, i, end, block_size)
        codes[slots] = torch.randn(end, d).to(torch.float8_e4m3fn).view(torch.uint8)
        scale[slots] = torch.rand(end) + 0.1
        table[i, -(-end // block_size) :] = -1
        first += n
    tensors = {
        "q": torch.randn(t, h, d).to(torch.float8_e4m3fn), "weights": torch.randn(t, h),
        "index_cache": codes, "index_scale": scale, "block_table": table,
        "cu_seqlens_q": torch.tensor([0, *query_lens]).cumsum(0).int(), "key_end": key_end,
    }  # fmt: skip
    sizes = {"topk": topk, "max_seqlen": max_seqlen, "block_size": block_size}
    return (
        {name: x.to(DEVICE) for name, x in tensors.items()}
        | sizes
        | {"max_seqlen_q": max([1, *query_lens])}
    )


def assert_right(chosen: Tensor, call: dict[str, Any]) -> None:
    lens = call["cu_seqlens_q"].diff().tolist()
    requests = [i for i, n in enumerate(lens) for _ in range(n)]
    assert chosen.shape == (len(requests), call["topk"])
    for row, request in enumerate(requests):
        end = int(call["key_end"][row])
        slots = request_slots(call["block_table"], request, end, call["block_size"])
        keys = call["index_cache"][slots].view(torch.float8_e4m3fn).double()
        logits = (call["q"][row].double() @ keys.T).relu()
        scores = call["weights"][row].double() @ logits * call["index_scale"][slots].double()
        count = min(end, call["topk"])
        got = chosen[row, :count].long()
        assert (chosen[row, count:] == -1).all()
        assert len(got.unique()) == count
        if count < end:
            outside = torch.ones(end, dtype=torch.bool, device=scores.device)
            outside[got] = False
            assert scores[got].min() >= scores[outside].max() - 1e-4 * (1 + scores.abs().max())
