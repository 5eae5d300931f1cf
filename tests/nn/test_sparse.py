"""Sparse attention as a whole: identities with dense attention, strict causality, budget."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import assert_near, double_precision
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from model1 import presets
from model1.config import ModelConfig, SparseConfig
from model1.nn import indexer
from model1.nn.indexer import LowRankSelector, attention_cost, core_count
from model1.ops.dense_attention import dense_attention
from tests.nn.helpers import build

LENGTH = 90
FORMS = {"model1": presets.tiny(), "v32": presets.tiny_v32()}


def with_sparse(config: ModelConfig, **changes: float) -> ModelConfig:
    assert config.sparse is not None
    return dataclasses.replace(config, sparse=dataclasses.replace(config.sparse, **changes))


def tokens(length: int = LENGTH, rows: int = 1) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(1))


class Attended:
    """One sparse pass on random vectors, with the sets it used."""

    def __init__(self, config: ModelConfig, t: int, s: int, dtype: torch.dtype) -> None:
        a = config.attention
        self.selector = LowRankSelector(config).to(dtype)
        with torch.no_grad():
            self.selector.mean.normal_(std=0.1)
            rows = torch.randn(self.selector.basis.T.shape, dtype=torch.float64)
            self.selector.basis.copy_(torch.linalg.qr(rows)[0].T)
        self.q = torch.randn(t, a.num_attention_heads, a.latent_dim, dtype=dtype)
        self.kv = torch.randn(s, a.latent_dim, dtype=dtype)
        self.sink = torch.randn(a.num_attention_heads, dtype=dtype)
        self.key_start = torch.randint(0, s // 3, (t,))
        self.key_end = self.key_start + torch.randint(1, s - s // 3, (t,))
        self.value_dim, self.nope = config.value_dim, a.latent_nope_dim
        self.scale = a.qk_head_dim**-0.5
        self.indices = torch.empty(0)
        self.in_rest = torch.empty(0)

    def sparse(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
        original, choose = indexer.remainder, indexer.select_core

        def chosen(*args: Tensor, **options: int) -> Tensor:
            self.indices = choose(*args, **options)
            return self.indices

        def spy(*args: Tensor, in_rest: Tensor, rotary_value: bool) -> tuple[Tensor, Tensor]:
            self.in_rest = in_rest
            return original(*args, in_rest=in_rest, rotary_value=rotary_value)

        monkeypatch.setattr(indexer, "remainder", spy)
        monkeypatch.setattr(indexer, "select_core", chosen)
        z = self.selector.project(self.kv[:, : self.nope])
        result = self.selector.attend(
            self.q, z, self.kv, self.key_start, self.key_end,
            value_dim=self.value_dim, softmax_scale=self.scale, attn_sink=self.sink,
        )  # fmt: skip
        return result.out, result.lse

    def dense(self) -> tuple[Tensor, Tensor]:
        out, lse = dense_attention(
            self.q, self.kv, self.key_start, self.key_end,
            value_dim=self.value_dim, softmax_scale=self.scale, attn_sink=self.sink,
        )  # fmt: skip
        assert lse is not None
        return out, lse


# --- identities --------------------------------------------------------------------------


@pytest.mark.parametrize("form", list(FORMS))
def test_full_rank_is_dense_attention(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_sparse(FORMS[form], index_rank=FORMS[form].attention.latent_nope_dim)
    case = Attended(config, 20, 60, torch.float64)
    with double_precision(), torch.no_grad():
        got, want = case.sparse(monkeypatch), case.dense()
    assert case.in_rest.any()  # the remainder has real work in this identity
    assert_near(got[0], want[0], 1e-9)
    assert_near(got[1], want[1], 1e-9)


@pytest.mark.parametrize("form", list(FORMS))
def test_a_core_of_everything_is_dense_attention(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_sparse(FORMS[form], core_fraction=1.0, index_topk=10_000)
    case = Attended(config, 20, 60, torch.float64)
    with double_precision(), torch.no_grad():
        got, want = case.sparse(monkeypatch), case.dense()
    assert not case.in_rest.any()
    assert_near(got[0], want[0], 1e-9)
    assert_near(got[1], want[1], 1e-9)


def test_identities_in_fp32_leave_only_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    for change in ({"index_rank": 64}, {"core_fraction": 1.0, "index_topk": 10_000}):
        case = Attended(with_sparse(presets.tiny(), **change), 20, 60, torch.float32)
        with torch.no_grad():
            got, want = case.sparse(monkeypatch), case.dense()
        assert_near(got[0], want[0], 1e-5)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("identity", ["full rank", "everything in the core"])
def test_whole_model_identity(form: str, identity: str) -> None:
    config = FORMS[form]
    rank = config.attention.latent_nope_dim
    change = {"index_rank": rank} if identity == "full rank" else {"core_fraction": 1.0}
    if identity != "full rank":
        change["index_topk"] = 10_000
    model = build(with_sparse(config, **change, dense_below=0))
    ids = tokens()
    with torch.inference_mode():
        sparse = model(ids)
        model.dense_attention = True
        assert_near(sparse, model(ids), 1e-4)


def test_without_an_identity_sparse_and_dense_differ() -> None:
    """The identities above compare two different computations."""
    model = build(with_sparse(presets.tiny(), dense_below=0))
    with torch.inference_mode():
        sparse = model(tokens())
        model.dense_attention = True
        assert (sparse - model(tokens())).abs().max() > 1e-3


# --- the sets ----------------------------------------------------------------------------


@given(
    t=st.integers(1, 6),
    s=st.integers(3, 60),
    topk=st.integers(8, 30),
    fraction=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_core_and_rest_are_disjoint_cover_and_hold_the_window(
    t: int, s: int, topk: int, fraction: float, seed: int
) -> None:
    torch.manual_seed(seed)
    config = with_sparse(presets.tiny(), index_topk=topk, core_fraction=fraction)
    case = Attended(config, t, s, torch.float32)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        case.sparse(patch)
    for i in range(t):
        start, end = int(case.key_start[i]), int(case.key_end[i])
        core = [j for j in case.indices[i].tolist() if j >= 0]
        rest = torch.nonzero(case.in_rest[i])[:, 0].tolist()
        assert sorted(core + rest) == list(range(start, end))
        assert set(range(max(start, end - 8), end)) <= set(core)
        assert len(core) <= topk


@given(
    n=st.integers(0, 20_000),
    window=st.integers(1, 200),
    extra=st.integers(0, 500),
    fraction=st.floats(0.001, 1.0),
)
@settings(max_examples=150, deadline=None)
def test_core_size_follows_share_window_and_cap(
    n: int, window: int, extra: int, fraction: float
) -> None:
    topk = window + extra
    sparse = SparseConfig(index_rank=4, index_topk=topk, core_fraction=fraction, dense_below=0)
    got = int(core_count(torch.tensor([n]), sparse, window))
    share = math.ceil(fraction * n)
    assert got == min(n, max(window, min(topk, share)))
    assert got <= topk


def test_the_cap_is_absolute() -> None:
    sparse = presets.code_small(compressed_vocab_size=1).sparse
    assert sparse is not None
    counts = core_count(torch.tensor([4096, 10**6, 10**9]), sparse, 128)
    assert counts.tolist() == [math.ceil(0.07 * 4096), 512, 512]


# --- dense below a few thousand tokens ---------------------------------------------------


def test_queries_that_see_little_never_touch_the_selector() -> None:
    config = presets.tiny()
    assert config.sparse is not None
    limit = config.sparse.dense_below
    model = build(config)
    ids = tokens()
    with torch.inference_mode():
        model.dense_attention = True
        dense = model(ids)
        model.dense_attention = False
        want, short = model(ids), model(ids[:, :limit])
        for layer in model.layers:
            layer.attn.selector.basis.mul_(-3.0)
            layer.attn.selector.mean.fill_(2.0)
        got = model(ids)
        assert torch.equal(model(ids[:, :limit]), short)
    assert torch.equal(got[:, :limit], want[:, :limit])
    assert_near(want[:, :limit], dense[:, :limit], 1e-5)
    assert ((got[:, limit:] - want[:, limit:]).abs().amax(-1) > 1e-3).all()


# --- strict causality --------------------------------------------------------------------


def causal_variants() -> dict[str, ModelConfig]:
    full = presets.tiny()
    assert full.engram is not None
    plain = dataclasses.replace(full, sparse=None, mhc=None, engram=None)
    conv = dataclasses.replace(full.engram, short_conv=True)
    return {
        "dense": plain,
        "sparse": dataclasses.replace(plain, sparse=full.sparse),
        "engram": dataclasses.replace(plain, engram=full.engram),
        "engram with convolution": dataclasses.replace(plain, engram=conv),
        "mhc": dataclasses.replace(plain, mhc=full.mhc),
        "everything": dataclasses.replace(full, engram=conv),
        "v32": dataclasses.replace(presets.tiny_v32(), moe=None),
    }


@pytest.mark.parametrize("name", list(causal_variants()))
def test_a_future_token_changes_no_bit_of_earlier_logits(name: str) -> None:
    model = build(causal_variants()[name])
    ids = tokens()
    with torch.inference_mode():
        want = model(ids)[0]
        for position in (1, 33, LENGTH - 1):  # dense rows only, sparse rows, the last token
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 7) % 256
            got = model(changed)[0]
            assert torch.equal(got[:position], want[:position])
            assert not torch.equal(got[position], want[position])
            if position < LENGTH - 20:
                assert (got[position + 20 :] != want[position + 20 :]).any()


def test_with_experts_a_future_token_changes_only_rounding() -> None:
    """A token that moves to another expert changes the size of that expert's matrix product."""
    model = build(presets.tiny_v32())
    ids = tokens()
    changed = ids.clone()
    changed[0, 50] += 1
    with torch.inference_mode():
        assert_near(model(changed)[0, :50], model(ids)[0, :50], 1e-5)


def test_another_document_changes_no_bit() -> None:
    model = build(causal_variants()["everything"])
    ids = tokens(rows=2)
    starts = torch.zeros_like(ids)
    starts[0, 41:] = 41
    changed = ids.clone()
    changed[0, :41] = (changed[0, :41] + 1) % 256
    with torch.inference_mode():
        want, got = model(ids, doc_starts=starts), model(changed, doc_starts=starts)
    assert torch.equal(got[0, 41:], want[0, 41:])
    assert torch.equal(got[1], want[1])
    assert not torch.equal(got[0, :41], want[0, :41])


# --- the budget --------------------------------------------------------------------------


def multiply_adds(config: ModelConfig, n: int) -> tuple[int, int, int]:
    """Per head and query over n tokens: dense, sparse, and the exact part of sparse."""
    assert config.sparse is not None
    nope, rope, rank = 192, 32, 16
    dense = n * (nope + rope) + n * (nope + rope)  # logits, then values of the same width
    core = min(512, max(128, math.ceil(0.07 * n)))
    exact = core * (nope + rope) * 2
    scan = n * (rank + rope)
    rest = (n - core) * (rank + rope)
    return dense, scan + exact + rest, exact


@pytest.mark.parametrize("n", [2049, 4096, 8192, 16384])
def test_the_shipped_model_spends_at_most_thirty_percent(n: int) -> None:
    config = presets.code_small(compressed_vocab_size=1)
    dense, sparse, exact = multiply_adds(config, n)
    assert attention_cost(config, n) == pytest.approx(sparse / dense, rel=1e-9)
    assert attention_cost(config, n) <= 0.30
    assert exact / dense <= 0.20


def test_cost_counts_what_the_config_switches_off() -> None:
    config = presets.code_small(compressed_vocab_size=1)
    assert attention_cost(config, 2048) == 1.0
    assert attention_cost(dataclasses.replace(config, sparse=None), 9999) == 1.0
    # Without rotary values both the dense value and the remainder lose 32 channels.
    vvpa = dataclasses.replace(config.vvpa, rotary_value=False)
    got = attention_cost(dataclasses.replace(config, vvpa=vvpa), 4096)
    core, dense = 287, 4096 * (224 + 192)
    assert got == pytest.approx((4096 * 48 + core * 416 + (4096 - core) * 16) / dense)


@pytest.mark.parametrize("n", [2049, 4096])
def test_products_executed_by_one_sparse_query(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The plain path also multiplies the core's zeros in the remainder; little else is extra."""
    config = presets.code_small(compressed_vocab_size=1)
    case = Attended(config, 1, n, torch.float32)
    case.key_start, case.key_end = torch.tensor([0]), torch.tensor([n])
    z = case.selector.project(case.kv[:, :192])
    monkeypatch.setattr(case.selector, "project", lambda _: z)  # once per token, not per query
    with torch.no_grad(), FlopCounterMode(display=False) as sparse_flops:
        case.sparse(monkeypatch)
    with FlopCounterMode(display=False) as dense_flops:
        case.dense()
    heads, bases = 6, 2 * 16 * 192  # the query into the basis, the result out of it
    dense, _, exact = multiply_adds(config, n)
    assert dense_flops.get_total_flops() == 2 * heads * dense
    executed = sparse_flops.get_total_flops() / (2 * heads)
    # The vote of the heads, and q . mean: made once, then carried as one more column of the scan.
    pooling, offset = n, 192 + n
    assert 0 <= executed - (exact + 2 * n * 48 + bases) <= pooling + offset
    assert executed / dense <= 0.30  # everything counted, not only the terms of attention_cost


# --- the basis ---------------------------------------------------------------------------


def test_retract_restores_orthonormal_rows_and_keeps_their_space() -> None:
    selector = LowRankSelector(presets.tiny())
    before = selector.basis.detach().clone()
    selector.retract()
    assert_near(selector.basis, before, 1e-5)
    with torch.no_grad():
        selector.basis += torch.randn_like(selector.basis) * 0.1
    moved = selector.basis.detach().clone()
    selector.retract()
    assert_near(selector.basis @ selector.basis.T, torch.eye(16), 1e-5)
    assert_near(moved @ selector.basis.T @ selector.basis, moved, 1e-5)
    assert ((selector.basis * moved).sum(-1) > 0).all()  # no row turned round
