"""The Hopper backward of sparse prefill: right, reproducible, taken where asked or faster."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from sparse_prefill_cases import (
    DEVICE,
    INVALID,
    Shape,
    assert_gradients_right,
    check_batch_invariance,
    check_empty_lists,
    gradients,
    make_arguments,
)

from model1.errors import BackendUnavailable
from model1.ops import sparse_prefill as contract
from model1.ops.backend import Operator, hopper_refusal
from model1.ops.sparse_prefill import gradient, sparse_prefill

MODEL1, V32 = (512, 512), (576, 512)
BOTH = pytest.mark.parametrize("dims", [MODEL1, V32], ids=["512", "576"])
EITHER = pytest.mark.parametrize("deterministic", [False, True])
NOT_HERE = hopper_refusal(torch.device(DEVICE))
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}"),
]


def make_call(dims: tuple[int, int] = MODEL1, **shape: Any) -> dict[str, Any]:
    return make_arguments(Shape(d=dims[0], value_dim=dims[1], **shape))


def check(arguments: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    return assert_gradients_right(arguments, backend="hopper", **options)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("first", range(5000, 5160, 20))
    def test_random_calls_are_right(self, first: int) -> None:
        for number in range(first, first + 20):
            random.seed(number)
            torch.manual_seed(number)
            has_both = random.random() < 0.5  # each combination is a compilation
            arguments = make_call(
                random.choice([MODEL1, V32]),
                t=random.choice([1, 2, 7, 17]),
                h=random.choice([1, 3, 16, 63, 64, 65, 128, 130]),
                s=random.choice([1, 95, 592, 1840]),
                topk=random.choice([1, 15, 63, 64, 65, 128, 129, 333, 577, 2048]),
                has_length=has_both,
                has_sink=has_both,
            )
            try:
                check(arguments, deterministic=number % 2 == 0)
            except AssertionError as error:
                raise AssertionError(f"call {number}") from error

    @BOTH
    @EITHER
    @pytest.mark.parametrize("h", [16, 64, 128])
    def test_many_queries(self, dims: tuple[int, int], h: int, deterministic: bool) -> None:
        arguments = make_call(dims, t=300, h=h, s=900, topk=300)
        check(arguments, deterministic=deterministic)

    @BOTH
    @EITHER
    def test_an_index_that_occurs_twice_counts_twice(
        self, dims: tuple[int, int], deterministic: bool
    ) -> None:
        arguments = make_call(dims, t=5, h=64, topk=70, has_length=False)
        arguments["kv"].nan_to_num_(0.5)
        arguments["topk_indices"][:] = torch.tensor([7] * 43 + [2] * 27)
        check(arguments, deterministic=deterministic)

    @BOTH
    @EITHER
    def test_queries_without_keys(self, dims: tuple[int, int], deterministic: bool) -> None:
        arguments = make_call(dims, t=4, h=64, topk=65, has_length=False)
        arguments["topk_indices"][0] = torch.tensor(INVALID * 10)[:65]
        arguments["topk_indices"][2] = -1
        grads = check(arguments, deterministic=deterministic)
        assert not grads["q"][[0, 2]].any()

    @EITHER
    def test_no_queries_no_keys_and_no_lists(self, deterministic: bool) -> None:
        for shape in ({"t": 0}, {"s": 0}):
            check(make_call(**shape), deterministic=deterministic)
        options = {"backend": "hopper", "deterministic": deterministic}
        for shape in ({"topk": 0}, {"topk": 0, "s": 0}):
            check_empty_lists(make_call(**shape), options)

    @pytest.mark.parametrize("length", [-(2**31), -1, 0, 1, 63, 64, 65, 2**31 - 1])
    def test_lengths_of_any_value(self, length: int) -> None:
        arguments = make_call(t=3, h=64, topk=70)
        arguments["kv"].nan_to_num_(0.25)
        dout = torch.randn(3, 64, 512)
        arguments["topk_length"][1] = max(0, min(length, 70))
        options: dict[str, Any] = {"backend": "hopper", "deterministic": True}
        want = gradients(arguments, dout.to(DEVICE), **options)
        arguments["topk_length"][1] = length
        got = gradients(arguments, dout.to(DEVICE), **options)
        assert all(torch.equal(got[name], grad) for name, grad in want.items())

    @BOTH
    def test_a_nan_that_is_named_comes_out_in_its_rows_only(self, dims: tuple[int, int]) -> None:
        arguments = make_call(dims, t=3, h=65, topk=70, has_length=False, has_sink=False)
        arguments["topk_indices"][0] = 4
        arguments["topk_indices"][1:] = 3
        arguments["kv"][3:5] = 1.0
        arguments["kv"][3, -1] = math.nan
        got = gradients(arguments, torch.randn(3, 65, 512, device=DEVICE), backend="hopper")
        assert got["q"][0].isfinite().all()
        assert got["q"][1:].isnan().all()
        assert got["kv"][4].isfinite().all()
        assert got["kv"][3].isnan().all()

    @BOTH
    def test_rows_of_any_strides(self, dims: tuple[int, int]) -> None:
        arguments = make_call(dims, t=6, h=5, topk=90)
        q, kv = arguments["q"], arguments["kv"]
        dout = torch.randn(6, 5, 512, device=DEVICE).to(q)
        options: dict[str, Any] = {"backend": "hopper", "deterministic": True}
        want = gradients(arguments | {"q": q.contiguous(), "kv": kv.contiguous()}, dout, **options)
        odd = [torch.nn.functional.pad(x, (1, 2), value=math.nan)[..., 1:-2] for x in (q, kv)]
        turned = q.transpose(0, 1).contiguous().transpose(0, 1)
        turned_dout = dout.transpose(0, 1).contiguous().transpose(0, 1)
        for tensors, given in (
            ({}, dout), ({"q": odd[0], "kv": odd[1]}, dout), ({"q": turned}, turned_dout),
        ):  # fmt: skip
            got = gradients(arguments | tensors, given, **options)
            assert all(torch.equal(got[name], grad) for name, grad in want.items())

    def test_a_gradient_without_a_layout(self) -> None:
        arguments = make_call(t=2, h=64, has_sink=False)
        one = torch.ones((), device=DEVICE, dtype=arguments["q"].dtype).expand(2, 64, 512)
        options: dict[str, Any] = {"backend": "hopper", "deterministic": True}
        want = gradients(arguments, one.contiguous(), **options)
        got = gradients(arguments, one, **options)
        assert all(torch.equal(got[name], grad) for name, grad in want.items())

    @BOTH
    def test_deterministic_gradients_repeat_to_the_bit(self, dims: tuple[int, int]) -> None:
        arguments = make_call(dims, t=200, h=130, s=9, topk=70)
        dout = torch.randn(200, 130, 512, device=DEVICE)
        first, *others = (
            gradients(arguments, dout, backend="hopper", deterministic=True) for _ in range(4)
        )
        for again in others:
            assert all(torch.equal(again[name], grad) for name, grad in first.items())

    @BOTH
    def test_rows_know_neither_mates_nor_padding(self, dims: tuple[int, int]) -> None:
        check_batch_invariance(make_call(dims, t=5, h=64, s=900, topk=300), backend="hopper")

    @BOTH
    @EITHER
    def test_it_agrees_with_the_portable_kernel(
        self, dims: tuple[int, int], deterministic: bool
    ) -> None:
        arguments = make_call(dims, t=9, h=64, s=300, topk=100)
        dout = torch.randn(9, 64, 512, device=DEVICE)
        options = {"deterministic": deterministic}
        got, want = (gradients(arguments, dout, backend=x, **options) for x in ("hopper", "triton"))
        for name, grad in want.items():
            torch.testing.assert_close(got[name], grad, atol=2e-2, rtol=2e-2)

    @BOTH
    @EITHER
    def test_auto_runs_it_for_64_heads(self, dims: tuple[int, int], deterministic: bool) -> None:
        portable = "_sparse_attn_bwd_kernel"
        fast = portable if deterministic else "_sparse_attn_bwd_hopper_kernel"
        for h, kernel in ((64, fast), (63, portable)):
            arguments = make_call(dims, t=3, h=h, topk=70)
            dout = torch.randn(3, h, 512, device=DEVICE)
            gradients(arguments, dout, deterministic=deterministic)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
                gradients(arguments, dout, deterministic=deterministic)
                torch.cuda.synchronize()
            names = {event.name for event in seen.events() or []}
            assert {name for name in names if "sparse_attn_bwd" in name} == {kernel}


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends of the operators to come, as on a Hopper GPU; plain PyTorch runs."""
    names: list[str] = []
    load = Operator.load

    def note(operator: Operator, backend: str) -> Any:
        names.append(backend)
        return load(operator, "ref")

    monkeypatch.setattr(Operator, "load", note)
    asked = {"auto": "triton"}
    monkeypatch.setattr(Operator, "resolve", lambda self, name, device: asked.get(name, name))
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: True)
    monkeypatch.setattr(contract, "hopper_wins", lambda *sizes: True)
    return names


def run_both(d: int = 512, h: int = 3, **options: Any) -> None:
    arguments = make_arguments(Shape(t=2, h=h, d=d, value_dim=512), dtype=torch.bfloat16)
    q = arguments["q"].detach().requires_grad_()
    sparse_prefill(**arguments | options | {"q": q}).out.sum().backward()


@pytest.mark.parametrize(
    ("asked", "wins", "used"),
    [
        ("hopper", False, ["hopper", "hopper"]),
        ("auto", False, ["hopper", "triton"]),
        ("auto", True, ["hopper", "hopper"]),
        ("triton", True, ["triton", "triton"]),
    ],
)
def test_the_gradient_is_of_the_kernel_that_was_asked_for_or_wins(
    asked: str, wins: bool, used: list[str], chosen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "hopper_backward_wins", lambda *call: wins)
    run_both(backend=asked)
    assert chosen == used


@BOTH
@EITHER
@pytest.mark.parametrize(("h", "used"), [(63, "triton"), (64, "hopper"), (128, "hopper")])
def test_auto_takes_it_where_it_was_seen_to_win(
    dims: tuple[int, int], deterministic: bool, h: int, used: str, chosen: list[str]
) -> None:
    run_both(dims[0], h, deterministic=deterministic)
    assert chosen == ["hopper", "triton" if deterministic else used]


def test_auto_is_portable_on_other_gpus(chosen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: False)
    run_both(h=64)
    assert chosen == ["triton", "triton"]


def test_more_pairs_of_one_query_than_32_bits_count_are_refused() -> None:
    pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")
    from model1.ops.sparse_prefill import hopper_backward

    arguments = make_arguments(Shape(t=1, h=65, d=512, value_dim=512), dtype=torch.bfloat16)
    endless = torch.empty(1, 1, dtype=torch.int32, device=DEVICE).expand(1, 2**21)
    out, lse = arguments["q"], torch.zeros(1, 65, device=DEVICE)
    with pytest.raises(BackendUnavailable, match=r"got 2147483648 \(2 tiles"):
        hopper_backward.sparse_prefill_backward_hopper(
            out, arguments["q"], arguments["kv"], endless, topk_length=None, attn_sink=None,
            out=out, lse=lse, softmax_scale=1.0, deterministic=True,
        )  # fmt: skip
