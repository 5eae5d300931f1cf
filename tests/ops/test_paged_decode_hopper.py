"""The Hopper kernel of paged decode: right, batch-invariant, chosen only where it may run."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from paged_decode_cases import Case, Shape, check, drawn_case, random_case, without
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import hopper_refusal
from model1.ops.kv_cache import KVLayout
from model1.ops.paged_decode import paged_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL1, V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
BF16_512, BF16_576 = KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64)
PLAIN_512, PLAIN_576 = {"d": 512}, {"d": 576}
KEPT: list[dict[str, Any]] = [
    PLAIN_512, PLAIN_576, *({"d": x.d, "layout": x} for x in (BF16_512, BF16_576, MODEL1, V32)),
]  # fmt: skip
NAMES = ["512", "576", "bf16 512", "bf16 576", "model1", "v32"]
EVERY = pytest.mark.parametrize("kept", KEPT, ids=NAMES)
# One that is copied and one that is converted: each shape is compiled, for some seconds.
TWO = pytest.mark.parametrize("kept", [KEPT[1], KEPT[4]], ids=["576", "model1"])
NOT_HERE = hopper_refusal(torch.device(DEVICE))
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}"),
]


def make_shape(kept: dict[str, Any] = PLAIN_576, **options: Any) -> Shape:
    sizes = {"h": 64, "value_dim": 512, "block_size": 64, "has_sink": True}
    return Shape(**sizes | {"dtype": torch.bfloat16} | kept | options)


def call(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return paged_decode(**arguments | options, backend="hopper")


def run(case: Case, **options: Any) -> tuple[Tensor, Tensor]:
    return call(case.arguments(DEVICE), **options)


def assert_same_bits(
    got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rows: Any = ...
) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y[rows])


def pick(arguments: dict[str, Any], requests: Tensor) -> dict[str, Any]:
    """The call of some of the requests."""
    names = ("q", "block_table", "cache_seqlens")
    return arguments | {name: arguments[name][requests].contiguous() for name in names}


def check_far_blocks(case: Case, far: Tensor) -> None:
    """The case's blocks at the end of a larger cache give the same bits."""
    arguments = case.arguments(DEVICE)
    near, table = arguments["kv_cache"], arguments["block_table"]
    first = len(far) - len(near)
    assert first * far.stride(0) > 2**31
    far[first:] = near
    moved = torch.where(table < len(near), table + first, table)
    assert_same_bits(call(arguments, kv_cache=far, block_table=moved), call(arguments))


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("first", range(3000, 3080, 20))
    @EVERY
    def test_random_calls_are_right(self, kept: dict[str, Any], first: int) -> None:
        for number in range(first, first + 20):
            draw = Random(number)
            h = draw.choice([1, 3, 16, 63, 64, 65, 128, 130])
            # with several queries a mask takes multiples of 64 heads
            causal = kept in (KEPT[1], KEPT[4]) and h % 64 == 0
            size = draw.choice([1, 2, 16, 48, 64, 256])
            shape = make_shape(kept, h=h, causal=causal, block_size=size)
            case, _ = drawn_case(shape, number, longest=700, may_be_ragged=False)
            check(case, run(case), f"case {number}, {shape}")

    @pytest.mark.parametrize("h", [1, 3, 16, 65, 130])
    def test_a_mask_over_one_query_hides_nothing(self, h: int) -> None:
        case = random_case(make_shape(h=h, causal=True), [70, 0, 1], [1, 1, 1], h)
        check(case, run(case), f"{h} heads")
        assert_same_bits(run(case), run(without(case, causal=False)))

    @TWO
    def test_causal_queries_before_the_first_key_are_empty(self, kept: dict[str, Any]) -> None:
        for h in (64, 128):
            shape = make_shape(kept, h=h, causal=True)
            case = random_case(shape, [2, 0, 1, 130], [4] * 4, 0)
            for deterministic in (False, True):
                out, lse = run(case, deterministic=deterministic)
                check(case, (out, lse), f"{h} heads")
                empty = lse[:, :, 0].isposinf().sum(1).tolist()
                assert empty == [2, 4, 3, 0]

    @pytest.mark.parametrize("deterministic", [False, True])
    @TWO
    def test_a_long_request_alone(self, kept: dict[str, Any], deterministic: bool) -> None:
        sizes = ((64, 2),) if deterministic else ((65, 1), (64, 3))
        for h, s_q in sizes:
            case = random_case(make_shape(kept, h=h, causal=s_q > 1), [40000], [s_q], 0)
            check(case, run(case, deterministic=deterministic), f"{h} heads, {s_q} queries")

    @pytest.mark.parametrize("deterministic", [False, True])
    @TWO
    def test_many_requests(self, kept: dict[str, Any], deterministic: bool) -> None:
        draw = Random(1)
        lengths = [draw.choice([0, 1, 63, 64, 65, draw.randint(0, 400)]) for _ in range(300)]
        shape = make_shape(kept, h=64 if deterministic else 3, causal=deterministic)
        case = random_case(shape, lengths, [1 + deterministic] * 300, 1)
        check(case, run(case, deterministic=deterministic), "300 requests")

    def test_more_requests_than_one_program_adds_up(self) -> None:
        draw = Random(2)
        lengths = [draw.randint(0, 3) for _ in range(4100)]
        case = random_case(make_shape(h=1, block_size=1), lengths, [1] * 4100, 2)
        check(case, run(case), "4,100 requests")

    def test_no_requests_and_none_with_tokens(self) -> None:
        case = random_case(make_shape(h=3), [0, 0, 0], [2, 2, 2], 0)
        out, lse = run(case)
        assert not out.any()
        assert lse.isposinf().all()
        none = pick(case.arguments(DEVICE), torch.arange(0, device=DEVICE))
        assert [list(x.shape) for x in call(none)] == [[0, 2, 3, 512], [0, 2, 3]]

    @TWO
    def test_a_row_without_a_sink(self, kept: dict[str, Any]) -> None:
        case = random_case(make_shape(kept, h=65, has_sink=False), [300, 0, 5], [2] * 3, 0)
        check(case, run(case), "no sink")

    @EVERY
    def test_table_entries_behind_the_last_block_are_not_read(self, kept: dict[str, Any]) -> None:
        case = random_case(make_shape(kept, h=3, block_size=16), [70, 0, 16, 1], [1] * 4, 0)
        want = run(case)
        check(case, want, "blocks of 16")
        arguments = case.arguments(DEVICE)
        table, lengths = arguments["block_table"], arguments["cache_seqlens"]
        is_behind = torch.arange(table.shape[1], device=DEVICE) * 16 >= lengths[:, None]
        for garbage in (-1, -(2**31), 2**31 - 1, 0, len(case.kv_cache)):
            arguments["block_table"] = table.masked_fill(is_behind, garbage)
            assert_same_bits(call(arguments), want)

    def test_keys_past_the_table_do_not_exist(self) -> None:
        case = random_case(make_shape(causal=True, block_size=16), [64, 64], [2, 2], 0)
        want = run(case)
        arguments = case.arguments(DEVICE)
        arguments["block_table"] = arguments["block_table"][:, :4]
        for length in (64, 65, 2**31 - 1):
            arguments["cache_seqlens"] = torch.full_like(arguments["cache_seqlens"], length)
            assert_same_bits(call(arguments, deterministic=True), run(case, deterministic=True))
            check(case, call(arguments), f"length {length}")
        check(case, want, "whole table")

    @pytest.mark.parametrize("deterministic", [False, True])
    @TWO
    def test_a_nan_that_is_seen_comes_out(self, kept: dict[str, Any], deterministic: bool) -> None:
        case = random_case(make_shape(kept, causal=True), [200, 200], [2, 2], 0)
        row = case.kv_cache[int(case.block_table[1, 2])]  # of 64 tokens
        if case.kv_cache.dtype == torch.uint8:
            row[3 * 576 : 3 * 576 + 448] = 0xFF
        else:
            row[3] = math.nan
        out, lse = run(case, deterministic=deterministic)
        assert out[1].isnan().all()
        assert lse[1].isnan().all()
        assert out[0].isfinite().all()
        assert lse[0].isfinite().all()

    def test_large_logits_do_not_overflow(self) -> None:
        case = without(random_case(make_shape(h=3), [400, 17], [1, 1], 0), softmax_scale=200.0)
        check(case, run(case), "scale 200")

    @TWO
    def test_deterministic_rows_do_not_know_their_mates(self, kept: dict[str, Any]) -> None:
        shape = make_shape(kept, causal=True)
        case = random_case(shape, [900, 0, 2500, 5, 64], [2] * 5, 0)
        want = run(case, deterministic=True)
        check(case, want, "all")
        arguments = case.arguments(DEVICE)
        wider = torch.nn.functional.pad(arguments["block_table"], (0, 700), value=2147480000)
        picks = ([4, 2, 0, 3, 1], [2], [0, 3], [0, 1, 2, 3, 4] * 60)
        for order in (torch.tensor(x, device=DEVICE) for x in picks):
            for table in (arguments["block_table"], wider):
                some = pick(arguments | {"block_table": table}, order)
                assert_same_bits(call(some, deterministic=True), want, order)

    def test_the_same_call_has_the_same_bits(self) -> None:
        case = random_case(make_shape(h=16), [9000, 40, 0, 700], [1] * 4, 0)
        want = run(case)
        check(case, want, "split")
        for _ in range(5):
            assert_same_bits(run(case), want)

    @TWO
    def test_queries_and_blocks_of_any_strides(self, kept: dict[str, Any]) -> None:
        case = random_case(make_shape(kept, h=5), [190, 3, 70], [2] * 3, 0)
        arguments = case.arguments(DEVICE)
        q, cache = arguments["q"], arguments["kv_cache"]
        want = call(arguments | {"q": q.contiguous()})
        check(case, want, "contiguous queries")
        odd = torch.nn.functional.pad(q, (1, 2))
        for same in (q, q.transpose(1, 2).contiguous().transpose(1, 2), odd[..., 1:-2]):
            assert_same_bits(call(arguments | {"q": same}), want)
        one = q[:1, :1].expand_as(q)
        assert_same_bits(call(arguments | {"q": one}), call(arguments | {"q": one.contiguous()}))
        # further apart, and not at the start of their memory
        gap = 64 if cache.dtype == torch.uint8 else 2
        wide = cache.new_full((len(cache) + 1, cache.shape[1] + gap, *cache.shape[2:]), 255)
        moved = wide[1:, : cache.shape[1]].copy_(cache)
        assert_same_bits(call(arguments | {"kv_cache": moved}), want)

    def test_blocks_beyond_two_to_the_31_elements(self) -> None:
        """In one allocation, as bf16 and as bytes; nobody fills it, so most of it is garbage."""
        num_blocks = 2**31 // (64 * 576) + 20
        memory = torch.empty(num_blocks, 64, 1, 576, dtype=torch.bfloat16, device=DEVICE)
        check_far_blocks(random_case(make_shape(h=16), [130], [1], 0), memory)
        case = random_case(make_shape(KEPT[4], h=16), [130], [1], 0)
        step, used = case.kv_cache.stride(0), case.kv_cache.shape[1]
        rows = memory.view(torch.uint8).flatten()
        check_far_blocks(case, rows[: len(rows) // step * step].view(-1, step)[:, :used])
        del memory, rows
        torch.cuda.empty_cache()

    @TWO
    @pytest.mark.parametrize("deterministic", [False, True])
    def test_a_captured_call_follows_other_tables_and_lengths(
        self, kept: dict[str, Any], deterministic: bool
    ) -> None:
        shape, options = make_shape(kept, causal=True), {"deterministic": deterministic}
        cases = [random_case(shape, x, [2] * 3, i) for i, x in enumerate(LENGTHS)]
        first = cases[0].arguments(DEVICE)
        names = ["q", "kv_cache", "block_table", "cache_seqlens", "attn_sink"]
        held = first | {name: first[name].clone() for name in names}
        call(held, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(held, **options)
        for case in reversed(cases):
            arguments = case.arguments(DEVICE)
            for name in names:
                held[name].copy_(arguments[name])
            graph.replay()
            check(case, got, f"lengths {case.cache_seqlens.tolist()}")

    def test_a_start_that_a_graph_cannot_ask_for_is_refused_at_the_launch(self) -> None:
        arguments = random_case(make_shape(h=3), [40], [1], 0).arguments(DEVICE)
        cache = arguments["kv_cache"]
        arguments["kv_cache"] = cache.new_empty(cache.numel() + 1)[1:].view_as(cache)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with pytest.raises(BackendUnavailable, match="multiples of 16 bytes, got 2 bytes behind"):
            compiled(arguments)

    def test_a_profiler_sees_the_names_that_benchmarks_look_for(self) -> None:
        case = random_case(make_shape(), [900], [1], 0)
        run(case)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(case)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() or []]
        assert sum("flash_fwd_splitkv_mla_kernel" in name for name in names) == 1
        assert sum("flash_fwd_mla_combine_kernel" in name for name in names) == 1


# As many blocks each, so that caches and tables have the same shapes.
LENGTHS = [[700, 64, 0], [64, 0, 700], [0, 650, 10]]


def test_a_machine_that_is_no_hopper_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(make_shape(h=3), [3], [1], 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper_refusal.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"^paged_decode/hopper needs"):
        run(case)
    hopper_refusal.cache_clear()
