"""The same weights give the same logits however the tokens reach the model.

`everything` switches all parts of the MODEL1 form on at once; `tiny` and `tiny_v32` are the shipped
presets of both forms. Lengths cross dense_below, so sparse attention and its remainder take part.
fp32, within 1e-4.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.nn.kv import CacheKind
from model1.nn.model import Model
from tests.nn.helpers import build, step_metadata

TOLERANCE = 1e-4
BLOCK = 16
LENGTH = 150
Case = tuple[Model, Tensor, Tensor]  # the model, token ids [1, LENGTH], logits of the full forward


def everything() -> ModelConfig:
    """The MODEL1 form with YaRN, experts, convolution and an untied head as well."""
    base, other = presets.tiny(), presets.tiny_v32()
    assert base.engram is not None
    return dataclasses.replace(
        base,
        tie_word_embeddings=False,
        moe=other.moe,
        engram=dataclasses.replace(base.engram, short_conv=True),
        vvpa=dataclasses.replace(base.vvpa, yarn=other.vvpa.yarn),
    )


def single_pass() -> ModelConfig:
    base = everything()
    assert base.mhc is not None
    return dataclasses.replace(base, mhc=dataclasses.replace(base.mhc, single_pass=True))


CONFIGS = {
    "model1": presets.tiny(),
    "v32": presets.tiny_v32(),
    "everything": everything(),
    "single_pass": single_pass(),
}


def both(name: str) -> ModelConfig:
    return CONFIGS[name]


def blocks_for(lengths: list[int], *, num_blocks: int, seed: int = 0) -> list[list[int]]:
    """Disjoint, shuffled block lists."""
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = []
    for length in lengths:
        need = -(-length // BLOCK)
        tables.append(order[:need])
        order = order[need:]
    return tables


def ngram_size(config: ModelConfig) -> int:
    assert config.engram is not None
    return config.engram.engram_max_ngram_size


def assert_close(got: Tensor, want: Tensor) -> None:
    worst = (got - want).abs().amax(dim=-1)
    assert worst.max() <= TOLERANCE, f"row {int(worst.argmax())} differs by {worst.max():.2e}"


def run_in_chunks(
    model: Model, history: list[int], sizes: list[int], blocks: list[int] | None = None
) -> Tensor:
    table = blocks_for([len(history)], num_blocks=24) if blocks is None else [blocks]
    cache = model.allocate_kv_cache(24, BLOCK, "fp32")
    outs, done = [], 0
    for size in sizes:
        meta = step_metadata(
            [(history, done, size)], block_size=BLOCK, blocks=table, ngram=ngram_size(model.config)
        )
        outs.append(model.forward_paged(meta, cache))
        done += size
    assert done == len(history)
    return torch.cat(outs)


@pytest.fixture(params=list(CONFIGS))
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    model = build(both(request.param))
    ids = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        yield model, ids, model(ids)[0]


def test_decode_token_by_token_equals_the_full_forward(case: Case) -> None:
    model, ids, full = case
    assert_close(run_in_chunks(model, ids[0].tolist(), [1] * LENGTH), full)


def test_blocks_that_follow_each_other_equal_the_full_forward(case: Case) -> None:
    """What a lone request gets, and a CPU then reads in place."""
    model, ids, full = case
    sizes = [37, 1, 1, 64, *[1] * 47]
    assert_close(run_in_chunks(model, ids[0].tolist(), sizes, list(range(5, 15))), full)


def test_recording_gradients_changes_only_rounding(case: Case) -> None:
    """Without them small steps on a CPU take fewer calls."""
    model, ids, full = case
    with torch.inference_mode(False), torch.enable_grad():
        logits = model(torch.tensor(ids.tolist()))[0]
    assert logits.requires_grad
    assert_close(logits.detach(), full)


def test_the_operators_of_the_first_layer_check_for_all(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids, _ = case
    names = ("kv_write.check_arguments", "paged_decode.check_query", "rope_gate.check_arguments")
    counts = dict.fromkeys(names, 0)

    def count(name: str) -> Callable[..., None]:
        def check(*args: object) -> None:
            counts[name] += 1

        return check

    for name in names:
        monkeypatch.setattr(f"model1.ops.{name}", count(name))
    run_in_chunks(model, ids[0, :5].tolist(), [4, 1])
    assert counts == dict.fromkeys(names, 2)


@pytest.mark.parametrize("sizes", [[LENGTH], [37, 1, 64, 13, 35], [BLOCK] * 9 + [6], [31, 2, 117]])
def test_chunked_prefill_equals_the_full_forward(case: Case, sizes: list[int]) -> None:
    model, ids, full = case
    assert_close(run_in_chunks(model, ids[0].tolist(), sizes), full)


def test_batch_of_unequal_lengths_equals_solo_forwards(case: Case) -> None:
    model, _, _ = case
    config = model.config
    generator = torch.Generator().manual_seed(2)
    lengths = [1, 9, 33, 64, 130, 5]
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    tables = blocks_for([n + 3 for n in lengths], num_blocks=40)
    cache = model.allocate_kv_cache(40, BLOCK, "fp32")
    extended = [p + torch.randint(0, 256, (3,), generator=generator).tolist() for p in prompts]
    want = [model(torch.tensor([e]))[0] for e in extended]
    # A mixed step (prefills of every length), then three steps of decoding together.
    chunks = [(e, 0, n) for e, n in zip(extended, lengths, strict=True)]
    meta = step_metadata(chunks, block_size=BLOCK, blocks=tables, ngram=ngram_size(config))
    got = model.forward_paged(meta, cache).split(lengths)
    for g, w, n in zip(got, want, lengths, strict=True):
        assert_close(g, w[:n])
    for i in range(3):
        chunks = [(e, n + i, 1) for e, n in zip(extended, lengths, strict=True)]
        meta = step_metadata(chunks, block_size=BLOCK, blocks=tables, ngram=ngram_size(config))
        got = model.forward_paged(meta, cache)
        assert_close(got, torch.stack([w[n + i] for w, n in zip(want, lengths, strict=True)]))


def test_decode_mixed_with_prefill_in_one_step(case: Case) -> None:
    model, ids, full = case
    history, n = ids[0].tolist(), ngram_size(model.config)
    tables = blocks_for([LENGTH, LENGTH], num_blocks=40)
    cache = model.allocate_kv_cache(40, BLOCK, "fp32")
    first = step_metadata([(history, 0, 100)], block_size=BLOCK, blocks=tables[:1], ngram=n)
    model.forward_paged(first, cache)
    both_requests = [(history, 100, 1), (history, 0, 70)]
    meta = step_metadata(both_requests, block_size=BLOCK, blocks=tables, ngram=n)
    got = model.forward_paged(meta, cache)
    assert_close(got, torch.cat([full[100:101], full[:70]]))


def test_packed_documents_equal_separate_rows(case: Case) -> None:
    model, ids, _ = case
    cuts = [0, 40, 41, 110, LENGTH]
    starts = torch.zeros(1, LENGTH, dtype=torch.int64)
    for begin, end in itertools.pairwise(cuts):
        starts[0, begin:end] = begin
    packed = model(ids, doc_starts=starts)[0]
    alone = [model(ids[:, a:b])[0] for a, b in itertools.pairwise(cuts)]
    assert_close(packed, torch.cat(alone))


@pytest.mark.parametrize(("kind", "limit"), [("bf16", 0.01), ("fp8", 0.06)])
@pytest.mark.parametrize("name", list(CONFIGS))
def test_quantised_caches_stay_near_the_exact_one(name: str, kind: CacheKind, limit: float) -> None:
    # Dense, because a quantised key may flip a near-tie of the selector, which moves logits of
    # random weights by more than the quantisation itself.
    config = dataclasses.replace(both(name), sparse=None)
    model = build(config)
    history = torch.randint(0, 256, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        exact = model(torch.tensor([history]))[0].softmax(-1)
        cache = model.allocate_kv_cache(24, BLOCK, kind)
        meta = step_metadata(
            [(history, 0, LENGTH)], block_size=BLOCK,
            blocks=blocks_for([LENGTH], num_blocks=24), ngram=ngram_size(config),
        )  # fmt: skip
        got = model.forward_paged(meta, cache).softmax(-1)
    distance = (got - exact).abs().sum(-1).mean() / 2
    assert distance <= limit, f"{kind}: mean total variation {distance:.4f}"
