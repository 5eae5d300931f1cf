"""The model on operator backends: a plug-in serves it, a GPU's kernels agree with the reference."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from example_site import forget_plug_ins, installed_example

from model1.cli.main import main
from model1.engine.config import EngineConfig
from model1.engine.engine import Engine
from model1.engine.request import SamplingParams
from model1.errors import BackendUnavailable
from model1.nn.model import Model
from model1.ops import backend as dispatch
from model1.presets import tiny, tiny_v32
from model1.weights import default_checkpoint, load_model
from tests.nn.helpers import build

from .fakes import FakeTokenizer, run_all

STEP_OPERATORS = {"norm_rope_store", "paged_decode", "lowrank_attention", "inverse_rope_gate"}
BLOCK_SIZE = 64


@pytest.fixture(scope="module", autouse=True)
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with installed_example(tmp_path_factory.mktemp("site")):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of the example's functions ran."""
    counts: Counter[str] = Counter()
    operators: Any = dispatch.plug_ins()["example"].operators

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*args, **options)

        return run

    for name, function in operators.items():
        monkeypatch.setitem(operators, name, counting(name, function))
    return counts


def random_tokens(count: int, seed: int, below: int = 256) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, below, (count,), generator=generator).tolist()


def greedy(model: Model, backend: str, prompts: list[list[int]], **options: Any) -> Any:
    """The tokens that an engine on this backend adds to each prompt."""
    engine = Engine(
        model,
        FakeTokenizer([b"x"] * (model.config.vocab_size - 3)),
        EngineConfig(device="cpu", backend=backend, max_num_seqs=4, **options),
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(
            str(i), prompt, SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
        )
    results = run_all(engine)
    return [results[str(i)].token_ids for i in range(len(prompts))]


# --- a plug-in ---------------------------------------------------------------------------


@pytest.mark.parametrize("config", [tiny(), tiny_v32()], ids=["model1", "v32"])
def test_a_plug_in_runs_every_operator_of_a_step(config: Any, calls: Counter[str]) -> None:
    model = build(config)
    prompts = [random_tokens(n, n) for n in (5, 90)]  # the second one beyond dense_below
    options = {"block_size": 8, "max_num_batched_tokens": 40}
    want = greedy(model, "ref", prompts, **options)
    assert not calls
    assert greedy(model, "example", prompts, **options) == want
    assert set(calls) >= STEP_OPERATORS


@pytest.mark.slow
def test_a_plug_in_serves_the_shipped_model(calls: Counter[str]) -> None:
    model, _ = load_model(default_checkpoint(), device="cpu", dtype=torch.float32)
    model.pack_int8()
    prompts = [random_tokens(n, n, 8192) for n in (12, 2060)]
    options = {"max_model_len": 2200}
    want = greedy(model, "ref", prompts, **options)
    assert not calls
    assert greedy(model, "example", prompts, **options) == want
    assert set(calls) >= STEP_OPERATORS
    assert all(calls[name] >= 8 for name in STEP_OPERATORS)  # layers


def test_a_backend_that_cannot_run_the_model_is_refused_before_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build(tiny())
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        greedy(model, "exmaple", [])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="norm_rope_store/triton needs a GPU, device is"):
        greedy(model, "triton", [])


def test_a_plug_in_without_an_operator_of_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sparse, dense = build(tiny()), build(dataclasses.replace(tiny(), sparse=None))
    operators: Any = dispatch.plug_ins()["example"].operators
    monkeypatch.delitem(operators, "lowrank_attention")
    dispatch._resolve.cache_clear()
    with pytest.raises(BackendUnavailable, match="does not provide lowrank_attention"):
        greedy(sparse, "example", [])
    assert greedy(dense, "example", []) == []  # it is not asked for what the model does not use
    monkeypatch.undo()
    forget_plug_ins()


@pytest.mark.parametrize("verb", [["generate", "x"], ["serve", "--port", "0"]])
def test_the_command_line_says_so_in_one_sentence(
    verb: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*verb, "--backend", "exmaple"]) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "got 'exmaple'" in line
