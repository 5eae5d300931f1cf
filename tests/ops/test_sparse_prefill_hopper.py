"""The Hopper kernel of sparse prefill: right, batch-invariant, chosen only where it may run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sparse_prefill_cases import (
    DEVICE,
    INVALID,
    Shape,
    assert_right,
    check_batch_invariance,
    check_empty_lists,
    check_random_case,
    make_arguments,
)

from model1.errors import BackendUnavailable
from model1.ops import sparse_prefill as contract
from model1.ops.backend import Operator, hopper_refusal
from model1.ops.sparse_prefill import SparsePrefillResult, sparse_prefill
from model1.ops.sparse_prefill.choice import hopper_call_refusal

MODEL1, V32 = (512, 512), (576, 512)
BOTH = pytest.mark.parametrize("dims", [MODEL1, V32], ids=["512", "576"])
PER_QUERY = ("q", "topk_indices", "topk_length")
NOT_HERE = hopper_refusal(torch.device(DEVICE))
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}"),
]


def make_call(dims: tuple[int, int] = MODEL1, **shape: Any) -> dict[str, Any]:
    return make_arguments(Shape(d=dims[0], value_dim=dims[1], **shape))


def call(arguments: dict[str, Any], **options: Any) -> SparsePrefillResult:
    return sparse_prefill(**arguments | options, backend="hopper")


def assert_same_bits(got: SparsePrefillResult, want: SparsePrefillResult, rows: Any = ...) -> None:
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y[rows])


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("first", range(3000, 3400, 20))
    def test_random_calls_are_right(self, first: int) -> None:
        for number in range(first, first + 20):
            check_random_case(
                number, [MODEL1, V32], call,
                t=[1, 2, 7, 17], h=[1, 3, 16, 63, 64, 65, 128, 130], s=[1, 95, 592, 1840],
                topk=[0, 1, 15, 63, 64, 65, 128, 129, 333, 577, 2047, 2048],
            )  # fmt: skip

    @pytest.mark.parametrize(("has_length", "has_sink"), [(True, False), (False, True)])
    def test_lengths_and_sinks_do_not_need_each_other(
        self, has_length: bool, has_sink: bool
    ) -> None:
        for h in (5, 64, 130):
            arguments = make_call(h=h, t=9, topk=150, has_length=has_length, has_sink=has_sink)
            assert_right(call(arguments), arguments)

    @pytest.mark.parametrize(("t", "h"), [(131, 3), (300, 64), (133, 130), (1500, 1)])
    @pytest.mark.parametrize("is_listed", [False, True])
    def test_more_queries_than_programs(self, t: int, h: int, is_listed: bool) -> None:
        # more than 1024 queries are listed without a look at their lengths
        arguments = make_call(t=t, h=h, s=90, topk=70, has_length=is_listed, has_sink=is_listed)
        assert_right(call(arguments), arguments)

    @pytest.mark.parametrize("empty_lse", [-math.inf, math.inf, 7.0])
    @BOTH
    def test_queries_without_keys(self, dims: tuple[int, int], empty_lse: float) -> None:
        arguments = make_call(dims, t=4, topk=65, has_length=False, has_sink=False)
        arguments |= {"empty_lse": empty_lse}
        arguments["topk_indices"][0] = torch.tensor(INVALID * 10)[:65]
        arguments["topk_indices"][2] = -1
        out, max_logits, lse = call(arguments)
        assert_right((out, max_logits, lse), arguments)
        assert not out[[0, 2]].any()
        assert (lse[[0, 2]] == empty_lse).all()
        assert (max_logits[[0, 2]] == -math.inf).all()

    def test_no_queries_no_keys_and_no_lists(self) -> None:
        for shape in ({"t": 0}, {"s": 0}, {"topk": 0}, {"topk": 0, "s": 0}):
            arguments = make_call(**shape)
            assert_right(call(arguments), arguments)
        check_empty_lists(make_call(topk=0), {"backend": "hopper"})

    @pytest.mark.parametrize("length", [-(2**31), -1, 0, 1, 69, 70, 71, 2**31 - 1])
    def test_lengths_of_any_value(self, length: int) -> None:
        arguments = make_call(t=3, topk=70)
        arguments["topk_length"][1] = max(0, min(length, 70))
        arguments["kv"].nan_to_num_(0.25)
        want = call(arguments)
        assert_right(want, arguments)
        arguments["topk_length"][1] = length
        assert_same_bits(call(arguments), want)

    @BOTH
    def test_a_nan_that_is_named_comes_out_in_its_rows_only(self, dims: tuple[int, int]) -> None:
        arguments = make_call(dims, t=3, h=65, topk=70, has_length=False, has_sink=False)
        arguments["topk_indices"][0] = 4
        arguments["topk_indices"][1:] = 3
        arguments["kv"][3:5] = 1.0
        arguments["kv"][3, -1] = math.nan
        for result in call(arguments):
            assert result[0].isfinite().all()
            assert result[1:].isnan().all()

    def test_an_index_that_occurs_twice_counts_twice(self) -> None:
        arguments = make_call(topk=70, has_length=False, has_sink=False)
        arguments["kv"].nan_to_num_(0.5)
        arguments["topk_indices"][:] = torch.tensor([7] * 43 + [2] * 27)
        assert_right(call(arguments), arguments)

    def test_large_logits_do_not_overflow(self) -> None:
        arguments = make_call(t=3, topk=130) | {"softmax_scale": 30.0}
        assert_right(call(arguments), arguments)

    def test_queries_of_any_strides(self) -> None:
        arguments = make_call(t=6, h=5, topk=90)
        q = arguments["q"]
        want = call(arguments | {"q": q.contiguous()})
        assert_right(want, arguments)
        odd = torch.nn.functional.pad(q, (1, 2))  # rows of 515 numbers: no tensor map has them
        for same in (q, q.transpose(0, 1).contiguous().transpose(0, 1), odd[..., 1:-2]):
            assert_same_bits(call(arguments | {"q": same}), want)
        one = arguments | {"q": q[:1, :1].expand_as(q)}
        assert_right(call(one), one)

    @BOTH
    def test_keys_at_any_address(self, dims: tuple[int, int]) -> None:
        arguments = make_call(dims, t=5, h=17, topk=90)
        kv, d = arguments["kv"], dims[0]
        want = call(arguments | {"kv": kv.contiguous()})
        assert_right(want, arguments)
        # slices of longer rows: 16-byte steps are read where they are, others are copied
        for before, behind in ((0, 8), (8, 0), (0, 5), (1, 7), (3, 2)):
            wide = torch.nn.functional.pad(kv, (before, behind), value=math.nan)
            assert_same_bits(call(arguments | {"kv": wide[:, before : before + d]}), want)
        far = kv.new_full((3 * len(kv), d), math.nan)[::3].copy_(kv)
        assert_same_bits(call(arguments | {"kv": far}), want)
        shifted = kv.new_empty(kv.numel() + 1)[1:].view_as(kv).copy_(kv)
        assert_same_bits(call(arguments | {"kv": shifted}), want)
        same = arguments | {"kv": torch.randn(1, d).to(kv).expand(len(kv), d)}
        assert_right(call(same), same)

    def test_lists_of_any_strides(self) -> None:
        arguments = make_call(t=5, topk=90, has_length=False, has_sink=False)
        arguments["kv"].nan_to_num_(0.5)
        row = arguments["topk_indices"][:1]
        got = call(arguments | {"topk_indices": row.expand(5, 90)})
        assert_same_bits(got, call(arguments | {"topk_indices": row.repeat(5, 1)}))

    def test_keys_beyond_two_to_the_31_elements(self) -> None:
        near = make_call(t=2, h=64, topk=128, has_length=False, has_sink=False)
        kv, index = near["kv"], near["topk_indices"]
        first = 2**31 // 512 + 60
        far = torch.empty(first + len(kv), 512, dtype=kv.dtype, device=DEVICE)
        far[first:] = kv
        moved = torch.where((index >= 0) & (index < len(kv)), index + first, index)
        moved = moved.masked_fill((index >= len(kv)) & (index < len(far)), -1)
        assert_same_bits(call(near, kv=far, topk_indices=moved.int()), call(near))
        del far
        torch.cuda.empty_cache()

    @BOTH
    @pytest.mark.parametrize("is_listed", [False, True])
    def test_order_and_company_of_the_queries_change_no_bit(
        self, dims: tuple[int, int], is_listed: bool
    ) -> None:
        t = 150
        arguments = make_call(
            dims, t=t, h=65, s=300, topk=200, has_length=is_listed, has_sink=is_listed
        )
        want = call(arguments)
        names = [name for name in PER_QUERY if arguments[name] is not None]
        picks = [torch.randperm(t), torch.arange(3), torch.tensor([77]), torch.randint(t, (400,))]
        for rows in (rows.to(DEVICE) for rows in picks):
            part = {name: arguments[name][rows].contiguous() for name in names}
            for deterministic in (False, True):
                assert_same_bits(call(arguments, **part, deterministic=deterministic), want, rows)

    def test_rows_and_gradients_know_neither_mates_nor_padding(self) -> None:
        check_batch_invariance(make_call(t=5, h=64, s=900, topk=300), backend="hopper")

    @pytest.mark.parametrize("is_listed", [False, True])
    def test_a_captured_call_follows_other_lists_and_lengths(self, is_listed: bool) -> None:
        shape = {"t": 150, "h": 64, "s": 300, "topk": 70}
        first, second = (
            make_call(**shape, has_length=is_listed, has_sink=is_listed) for _ in range(2)
        )
        names = ["q", "kv", "topk_indices"] + ["topk_length", "attn_sink"] * is_listed
        held = first | {name: first[name].clone() for name in names}
        call(held)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = call(held)
        for arguments in (second, first):
            for name in names:
                held[name].copy_(arguments[name])
            graph.replay()
            assert_right(got, arguments)

    def test_a_profiler_sees_the_name_that_benchmarks_look_for(self) -> None:
        arguments = make_call()
        call(arguments)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call(arguments)
            torch.cuda.synchronize()
        names = [event.name for event in profile.events() or []]
        assert sum("sparse_attn_fwd_kernel" in name for name in names) == 1


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fp16": ({}, {"dtype": torch.float16}, "takes bfloat16, got torch.float16"),
    "fp32": ({}, {"dtype": torch.float32}, "takes bfloat16, got torch.float32"),
    "channels": ({"d": 528}, {}, "512 or 576 channels with 512 of values, got 528 with 512"),
    "values": ({"d": 576, "value_dim": 576}, {}, "got 576 with 576"),
    "few values": ({"value_dim": 448}, {}, "got 512 with 448"),
    "zero": ({}, {"softmax_scale": 0.0}, "a softmax_scale above 0, got 0.0"),
    "negative": ({}, {"softmax_scale": -0.05}, "a softmax_scale above 0, got -0.05"),
    "nan": ({}, {"softmax_scale": math.nan}, "a softmax_scale above 0, got nan"),
}


def refused_call(name: str) -> dict[str, Any]:
    shape, options, _ = REFUSED[name]
    dtype = options.get("dtype", torch.bfloat16)
    arguments = make_arguments(Shape(**{"d": 512, "value_dim": 512} | shape), dtype=dtype)
    return arguments | {x: y for x, y in options.items() if x != "dtype"}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the calls to come, as on a GPU where the Hopper kernel wins all of them."""
    names: list[str] = []
    load = Operator.load

    def note(operator: Operator, backend: str) -> Any:
        names.append(backend)
        return load(operator, "ref")

    monkeypatch.setattr(Operator, "load", note)
    monkeypatch.setattr(Operator, "resolve", lambda self, name, device: AUTO.get(name, name))
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: True)
    monkeypatch.setattr(contract, "hopper_wins", lambda *sizes: True)
    return names


AUTO = {"auto": "triton"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_kernel_does_not_take_is_refused_by_name(name: str, chosen: list[str]) -> None:
    arguments = refused_call(name)
    with pytest.raises(BackendUnavailable, match=r"^sparse_prefill/hopper takes ") as error:
        call(arguments)
    assert str(error.value).endswith(REFUSED[name][2])
    assert chosen == []


@pytest.mark.parametrize("name", REFUSED)
def test_auto_is_portable_for_what_the_kernel_does_not_take(name: str, chosen: list[str]) -> None:
    sparse_prefill(**refused_call(name))
    assert chosen == ["triton"]


@BOTH
def test_auto_takes_the_kernel_where_it_wins(
    dims: tuple[int, int], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = make_arguments(Shape(d=dims[0], value_dim=dims[1]), dtype=torch.bfloat16)
    assert hopper_call_refusal(torch.bfloat16, *dims, 0.05) is None
    sparse_prefill(**arguments)
    sparse_prefill(**arguments, backend="triton")
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: False)
    sparse_prefill(**arguments)
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: True)
    monkeypatch.setattr(contract, "hopper_wins", lambda *sizes: False)
    sparse_prefill(**arguments)
    assert chosen == ["hopper", "triton", "triton", "triton"]


def test_a_machine_that_is_no_hopper_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(Shape(d=512, value_dim=512), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper_refusal.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"^sparse_prefill/hopper needs"):
        call(arguments)
    hopper_refusal.cache_clear()
