"""The benchmark's calls are real calls: every builder runs, small, on the CPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from line_budget import ROOT
from torch import Tensor

import model1.flash_mla as flash_mla
from benchmarks import run
from benchmarks.cases import (
    MODULES,
    Work,
    dense_decode,
    engram,
    fp8_linear,
    kv_write,
    mha_prefill,
    moe,
    own_work,
    sparse_decode,
    sparse_prefill,
)
from benchmarks.kernel_inputs import MODEL1, V32, block_tables, random_slots
from model1.ops.kv_cache import gather_and_dequantize
from model1.testing.timing import Timing

CPU = torch.device("cpu")
TWO_SCOPES = sparse_decode.Shape(
    layout=MODEL1, h=2, topk=8, s_kv=40, page=16, extra_topk=24, extra_page=2, has_lengths=True
)
SHAPES = {
    "MODEL1": TWO_SCOPES,
    "one scope": dataclasses.replace(TWO_SCOPES, extra_topk=0, has_lengths=False),
    "V32": sparse_decode.Shape(layout=V32, h=3, topk=16, s_kv=40, page=64),
}


def assert_rivals_agree(work: Work, names: set[str], tolerance: float) -> None:
    ours = work.bind(flash_mla)()
    assert set(work.rivals) == names
    for prepare in work.rivals.values():
        for a, b in zip(ours, prepare()(), strict=True):
            assert a.shape == b.shape
            assert run.similarity_gap(a, b) < tolerance


@pytest.mark.parametrize("name", SHAPES)
def test_sparse_decode_calls_run_and_count_their_work(name: str) -> None:
    shape = SHAPES[name]
    work = sparse_decode.interface_work(2, shape, CPU)
    out, lse = work.bind(flash_mla)()
    assert out.shape == (2, shape.s_q, shape.h, 512)
    assert out.isfinite().all()
    assert out.abs().sum() > 0
    assert lse.shape == (2, shape.h, shape.s_q)
    keys = work.flop / (2 * shape.h * (shape.layout.d + 512))
    assert 2 * shape.s_q * shape.topk <= keys
    assert keys <= 2 * shape.s_q * (shape.topk + shape.extra_topk)
    assert work.num_bytes > shape.topk * 576
    own = sparse_decode.deterministic_work(2, shape, CPU)
    assert torch.equal(own.bind(None)()[0], out)
    assert_rivals_agree(own, {"deterministic"}, 1e-4)


def test_a_peer_gets_64_heads_and_gives_those_that_were_asked_for() -> None:
    heads: list[int] = []

    def record(q: Tensor, *args: Any, attn_sink: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        heads.extend((q.shape[2], len(attn_sink)))
        return flash_mla.flash_mla_with_kvcache(q, *args, attn_sink=attn_sink, **kwargs)

    peer = SimpleNamespace(
        __name__="peer", get_mla_metadata=flash_mla.get_mla_metadata, flash_mla_with_kvcache=record
    )
    work = sparse_decode.interface_work(2, TWO_SCOPES, CPU)
    out, lse = work.bind(peer)()
    want, want_lse = work.bind(flash_mla)()
    assert heads == [64, 64]
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


def test_sparse_decode_reads_a_slot_once() -> None:
    shape = dataclasses.replace(TWO_SCOPES, topk=3, extra_topk=2)
    x = sparse_decode.inputs(2, shape, CPU)
    assert x.extra is not None
    assert x.extra_length is not None
    x.main.slots.copy_(torch.tensor([[7, 8, -1], [9, 8, -1]]))  # 7, 8, 9 and -1
    x.extra.slots.copy_(torch.tensor([7, 5]))
    x.extra_length.copy_(torch.tensor([1, 0]))  # 7 of the other cache
    flop, num_bytes = sparse_decode.cost(x, shape)
    assert flop == 2 * 2 * (2 * 2 * 3 + 2 * 1) * (512 + 512)
    assert num_bytes == 5 * 576 + 2 * 2 * 2 * 2 * (512 + 512)


def test_prefill_calls_run_forward_and_backward() -> None:
    work = sparse_prefill.forward_work(512, 2, 8, 32, CPU, s_q=5)
    out, largest, lse = work.bind(flash_mla)()
    assert out.shape == (5, 2, 512)
    assert largest.shape == lse.shape == (5, 2)
    assert (largest <= lse).all()
    work = sparse_prefill.backward_work(512, 2, 8, 32, CPU, s_q=5)
    assert [x.shape for x in work.bind(None)()] == [(5, 2, 512), (32, 512), (2,)]
    assert_rivals_agree(work, {"deterministic"}, 1e-4)


def test_dense_calls_run() -> None:
    out, lse = dense_decode.interface_work(2, 2, 3, 70, CPU).bind(flash_mla)()
    assert out.shape == (2, 2, 3, 512)
    assert lse.isfinite().all()
    own = dense_decode.deterministic_work(2, 2, 3, 70, CPU)
    assert torch.equal(own.bind(None)()[0], out)
    assert_rivals_agree(own, {"deterministic"}, 1e-4)


@pytest.mark.parametrize(("layout", "token_bytes"), [(MODEL1, 2128), (V32, 2328)])
def test_kv_writes_store_every_token_and_take_turns(layout: Any, token_bytes: int) -> None:
    work = kv_write.store_work(150, layout, CPU, copied_bytes=2 * 150 * token_bytes)
    assert work.num_bytes == 150 * token_bytes
    call = work.bind(None)
    caches = [call()[0] for _ in range(3)]
    assert caches[0] is caches[2]
    assert caches[0] is not caches[1]
    slots = torch.arange(192)
    rows = gather_and_dequantize(
        caches[0], slots, layout=layout, block_size=64, dtype=torch.float32
    )
    assert (rows.abs().sum(1) > 0).sum() == 150


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_the_engram_gate_and_pytorch_agree(step: Any) -> None:
    work = engram.gate_work(step, 3, 2, 32, CPU)
    assert work.num_bytes == 3 * 32 * 2 * {"forward": 7, "backward": 12}[step]
    assert_rivals_agree(work, {"pytorch"}, 1e-6)


def test_engram_rows_and_a_copy_of_their_bytes_agree() -> None:
    work = engram.gather_work(2, CPU, table_bytes=264 * 50)
    assert work.num_bytes == 2 * 24 * (264 + 8 + 512)
    (rows,) = work.bind(None)()
    assert torch.equal(work.bind(None)()[0], rows)
    assert set(work.rivals) == {"index_select", "264-byte reads"}
    for prepare in work.rivals.values():
        codes, scales = prepare()()
        assert codes.shape == rows.shape == (48, 256)
        assert scales.shape == (48, 8)
        assert run.similarity_gap(rows, codes) < 1e-9


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_mha_prefill_and_sdpa_agree(step: Any) -> None:
    work = mha_prefill.mha_work(step, 32, 16, 2, 2, 12, CPU)
    assert set(work.rivals) == {"flex", "sdpa"}
    rivals = {"sdpa": work.rivals["sdpa"]}
    assert_rivals_agree(dataclasses.replace(work, rivals=rivals), {"sdpa"}, 1e-3)


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_mha_prefill_is_bound_to_a_peer(step: Any) -> None:
    calls = []

    def attend(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return flash_mla.flash_attn_varlen_func(*args, **options)

    work = mha_prefill.mha_work(step, 192, 128, 1, 2, 3, CPU)
    assert work.takes_peer
    peer = work.bind(SimpleNamespace(flash_attn_varlen_func=attend))()
    assert calls == [{"softmax_scale": 192**-0.5, "causal": True}]
    assert all(torch.equal(a, b) for a, b in zip(peer, work.bind(flash_mla)(), strict=True))
    assert not mha_prefill.mha_work(step, 32, 16, 1, 2, 3, CPU).takes_peer
    with pytest.raises(AttributeError, match="flash_attn_varlen_func"):
        work.bind(SimpleNamespace())()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_mha_prefill_and_flex_attention_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # minutes otherwise
    work = mha_prefill.mha_work("forward", 32, 16, 2, 2, 12, CPU)
    assert_rivals_agree(work, {"flex", "sdpa"}, 1e-3)


def test_fp8_linear_calls_run_and_are_near_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_linear, "fp8_linear", _on_ref(fp8_linear.fp8_linear))
    for build in (fp8_linear.forward_work, fp8_linear.training_work):
        assert_rivals_agree(build(20, 256, 128, CPU), {"bf16", "triton"}, 5e-3)


def test_expert_calls_run_and_agree_with_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "moe_experts", _on_ref(moe.moe_experts))
    for step in ("forward", "forward+backward"):
        work = moe.layer_work(step, 20, 32, 16, 5, 2, CPU)
        assert_rivals_agree(work, {"plain grouped_mm", "triton"}, 1e-3)
    assert_rivals_agree(moe.route_work(9, 8, 2, CPU), {"pytorch"}, 1e-9)


def _on_ref(function: Any) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        return function(*args, **(options | {"backend": "ref"}))

    return call


def test_slots_are_distinct_tokens_of_their_own_request() -> None:
    lengths = torch.tensor([5, 17], dtype=torch.int32)
    table, num_blocks = block_tables(lengths, 4)
    assert sorted(table.flatten().tolist()) == list(range(num_blocks))
    slots = random_slots(lengths, 3, 8, table, 4)
    for i, length in enumerate(lengths.tolist()):
        own = {int(table[i, j // 4]) * 4 + j % 4 for j in range(length)}
        for row in slots[i].tolist():
            used = [slot for slot in row if slot >= 0]
            assert len(set(used)) == len(used) == min(8, length)
            assert set(used) <= own
            assert row[len(used) :] == [-1] * (8 - len(used))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.OPERATOR)
def test_every_module_names_its_cases_and_tests(module: Any) -> None:
    cases = list(module.cases())
    assert {case.operator for case in cases} == {module.OPERATOR}
    assert len({case.name for case in cases}) == len(cases) > 0
    assert all(list(ROOT.glob(pattern)) for pattern in module.TESTS)


def test_similarity_gap_is_zero_only_for_equal_results() -> None:
    a = torch.randn(4, 5)
    assert run.similarity_gap(a, a) == pytest.approx(0.0, abs=1e-12)
    assert run.similarity_gap(a, 1.1 * a) > 1e-3


def test_a_rival_is_compared_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "time_call", lambda call, graph: call() and Timing(30.0, 29.0, 31.0))
    ones = (torch.ones(3),)
    ours, timing = (lambda: ones), Timing(20.0, 19.0, 21.0)
    monkeypatch.setattr(run, "waits_for_device", lambda call: call is not ours)

    def refused() -> Any:
        raise ValueError("too wide\nand more")

    row = {
        "operator": "x", "case": "y", "us": dataclasses.asdict(timing), "tflops": 1.0,
        "percent_of_matmul": 2.0, "gb_per_s": 3.0, "percent_of_copy": 4.0, "graph": True,
        "rivals": {
            "same": run.compare(lambda: ours, ours, timing, True),
            "waits": run.compare(lambda: lambda: ones, ours, timing, True),
            "narrow": run.compare(refused, ours, timing, True),
        },
    }  # fmt: skip
    assert row["rivals"]["same"]["ratio"] == 1.5
    lines = run.format_row(row).splitlines()
    assert lines[1:] == [
        "    same: 30.0 us (29.0-31.0), ratio 1.50, gap 0e+00",
        "    waits: 30.0 us (29.0-31.0), ratio 1.50, gap 0e+00, no graph: it waits for the device",
        "    narrow: ValueError: too wide",
    ]


def test_an_operator_of_ours_is_not_bound_to_a_peer() -> None:
    work = own_work(lambda: (torch.zeros(1),), 0.0, 1.0)
    assert not work.takes_peer
    assert work.bind(None)()[0].item() == 0.0
