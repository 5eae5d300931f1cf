"""The FlashMLA calls on a GPU: the CPU's checks at real sizes, and what only a GPU has."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_mla_cases import (
    BF16,
    DV,
    MODEL1,
    V32,
    Scope,
    as_tokens,
    check_dense_decode,
    check_sparse_decode,
    check_sparse_fwd,
    check_varlen,
    make_scope,
)

import model1.flash_mla as flash_mla
from model1.ops.kv_cache import allocate_kv_cache, quantize_and_store

pytestmark = pytest.mark.gpu

PAGES = (2, 53, 61, 64, 69, 256, 576)


@pytest.mark.parametrize("case", range(40))
def test_sparse_decode(case: int) -> None:
    pick = random.Random(case)
    torch.manual_seed(case)
    layout = pick.choice([MODEL1, MODEL1, V32, BF16])
    dtype = torch.bfloat16 if layout is BF16 else pick.choice([torch.float8_e4m3fn, torch.uint8])
    b, s_q, h = pick.choice([1, 4, 37]), pick.choice([1, 2, 3]), pick.choice([5, 16, 64, 128])
    sink, with_length = pick.random() < 0.7, pick.random() < 0.7

    def scope(topk: int) -> Scope:
        lengths = [pick.choice([0, topk, pick.randrange(topk + 1)]) for _ in range(b)]
        if not with_length:
            lengths = [topk] * b  # what no list counts is NaN
        page = pick.choice(PAGES)
        return make_scope(layout, lengths, s_q, topk, page, dtype=dtype, device="cuda")

    main = scope(pick.choice([1, 64, 128, 576, 2048]))
    extra = scope(pick.choice([3, 64, 512])) if pick.random() < 0.5 else None
    check_sparse_decode(main, extra, h, DV, with_sink=sink, with_length=with_length)


@pytest.mark.parametrize("case", range(40))
def test_dense_decode(case: int) -> None:
    pick = random.Random(case)
    torch.manual_seed(case)
    h = pick.choice([1, 3, 9, 63, 64, 126, 128])
    layout = pick.choice([None, None, MODEL1, V32])
    hkv = 1 if layout else pick.choice([n for n in (1, 2, 3, 8) if h % n == 0])
    longest = pick.choice([20, 140, 1500])
    lengths = [pick.choice([0, longest, pick.randrange(longest)]) for _ in range(6)]
    page = pick.choice([64, 64, 16, 7])
    dtype = pick.choice([torch.bfloat16, torch.float16])
    check_dense_decode(
        [longest, *lengths], pick.choice([1, 2, 4]), h, hkv, page, pick.random() < 0.5,
        q_dtype=dtype, layout=layout, device="cuda",
    )  # fmt: skip


@pytest.mark.parametrize("case", range(20))
def test_sparse_fwd(case: int) -> None:
    pick = random.Random(case)
    torch.manual_seed(case)
    check_sparse_fwd(
        pick.choice([1, 62, 213]), pick.choice([95, 592, 1840]), pick.choice([16, 64, 128]),
        pick.choice([128, 256, 384, 1024]), d=pick.choice([512, 576]),
        with_sink=pick.random() < 0.5, with_length=pick.random() < 0.5, device="cuda",
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen(packing: str, causal: bool) -> None:
    lengths_q, lengths_k = [130, 0, 64, 1, 257], [140, 4, 64, 300, 257]
    if packing == "qkv":
        lengths_k = lengths_q
    check_varlen(lengths_q, lengths_k, 4, 4, causal=causal, packing=packing, device="cuda")


def test_more_query_rows_than_a_grid_axis_holds() -> None:
    q = torch.randn(70000, 4, 512, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(256, 1, 512, device="cuda", dtype=torch.bfloat16)
    indices = torch.randint(-9, 256, (70000, 1, 256), device="cuda", dtype=torch.int32)
    many = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.05)
    few = flash_mla.flash_mla_sparse_fwd(q[-7:], kv, indices[-7:], 0.05)
    for x, y in zip(many, few, strict=True):
        torch.testing.assert_close(x[-7:], y)


@pytest.mark.parametrize("layout", [MODEL1, V32], ids=["model1", "v32"])
def test_slots_beyond_four_gigabytes(layout: Any) -> None:
    num_blocks, page = 130_000, 64
    q = torch.randn(1, 1, 64, layout.d, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(8, layout.d, device="cuda", dtype=torch.bfloat16)
    results = []
    for first in (0, num_blocks * page - 8):
        cache = allocate_kv_cache(num_blocks if first else 1, page, layout, "cuda").fill_(0xFF)
        slots = torch.arange(first, first + 8, dtype=torch.int32, device="cuda")
        quantize_and_store(kv, cache, slots, layout=layout, block_size=page)
        assert not first or cache.numel() > 2**32
        holder, _ = flash_mla.get_mla_metadata()
        results.append(
            flash_mla.flash_mla_with_kvcache(
                q, as_tokens(cache, layout, page), None, None, DV, holder,
                is_fp8_kvcache=True, indices=slots.view(1, 1, 8),
            )
        )  # fmt: skip
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


def test_a_captured_call_may_be_replayed_with_other_lengths() -> None:
    main = make_scope(MODEL1, [64] * 5, 1, 64, 64, device="cuda")
    q = torch.randn(5, 1, 64, 512, device="cuda", dtype=torch.bfloat16)
    holder, _ = flash_mla.get_mla_metadata()

    def call(holder: flash_mla.FlashMLASchedMeta) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_mla.flash_mla_with_kvcache(
            q, main.k_cache, None, None, DV, holder, is_fp8_kvcache=True, indices=main.indices,
            topk_length=main.length,
        )  # fmt: skip

    call(holder)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(holder)
    for lengths in ([64, 0, 3, 40, 64], [1, 1, 64, 0, 17]):
        main.length.copy_(torch.tensor(lengths))
        q.normal_()
        graph.replay()
        for x, y in zip(captured, call(flash_mla.get_mla_metadata()[0]), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        (
            "flash_fwd_splitkv_mla_fp8_sparse_kernel",
            lambda: check_sparse_decode(
                make_scope(MODEL1, [128] * 3, 2, 128, 64, device="cuda"), None, 64, DV
            ),
        ),
        (
            "flash_fwd_splitkv_mla_kernel",
            lambda: check_dense_decode([300, 20], 1, 16, 1, 64, False, device="cuda"),
        ),
        ("sparse_attn_fwd", lambda: check_sparse_fwd(62, 592, 64, 128, device="cuda")),
    ],
)
def test_a_profiler_finds_one_kernel_of_the_expected_name(
    name: str, check: Callable[[], None]
) -> None:
    check()  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        check()
        torch.cuda.synchronize()
    assert len({event.name for event in profile.events() or [] if name in event.name}) == 1
