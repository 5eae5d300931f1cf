"""Which implementation runs: the table of `resolve`, the refusals, plug-ins."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from model1.errors import BackendUnavailable
from model1.ops import backend as module
from model1.ops.backend import Backend, Operator

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NPU = torch.device("meta")  # stands for an accelerator that only a plug-in knows
REF_ONLY = Operator(name="norm", implementations={"ref": "operator:neg"})
BOTH = Operator(
    name="attend",
    implementations={"ref": "operator:neg", "triton": "operator:pos"},
    triton_min_capability=(9, 0),
)


class Plugin:
    """Claims a device type of its own; provides what it is told to."""

    def __init__(self, device_type: str, **operators: Callable[..., Any]) -> None:
        self.device_types = frozenset({device_type})
        self.operators = operators


@pytest.fixture(autouse=True)
def fresh_choices(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No plug-ins, no interpreter, and nothing remembered from or for other tests."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(module, "entry_points", lambda group: [])
    cached = (module.plug_ins, module._resolve, module._has_triton)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def has_triton(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    monkeypatch.setattr(module, "_has_triton", lambda: installed)


def has_gpu(monkeypatch: pytest.MonkeyPatch, major: int, minor: int) -> None:
    has_triton(monkeypatch, True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))


def install(monkeypatch: pytest.MonkeyPatch, **plug_ins: object) -> None:
    points = [SimpleNamespace(name=name, load=lambda p=p: p) for name, p in plug_ins.items()]
    monkeypatch.setattr(module, "entry_points", lambda group: points)


@pytest.mark.parametrize("installed", [True, False])
def test_auto_on_a_cpu_is_ref(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, installed)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BOTH.resolve("auto", CPU) == REF_ONLY.resolve("auto", CPU) == "ref"


@pytest.mark.parametrize(
    ("operator", "capability", "chosen"),
    [
        (BOTH, (9, 0), "triton"),
        (BOTH, (12, 0), "triton"),
        (BOTH, (8, 9), "ref"),
        (REF_ONLY, (9, 0), "ref"),
    ],
)
def test_auto_on_a_gpu(
    operator: Operator, capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpu(monkeypatch, *capability)
    assert operator.resolve("auto", CUDA) == chosen
    assert operator.resolve("ref", CUDA) == "ref"


def test_auto_without_triton_is_ref_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    has_triton(monkeypatch, False)
    with caplog.at_level(logging.INFO, logger="model1.ops.backend"):
        assert [BOTH.resolve("auto", CUDA) for _ in range(3)] == ["ref"] * 3
    (line,) = (record.getMessage() for record in caplog.records)  # once, not at every call
    assert line.startswith("attend runs on backend ref (cuda): triton needs Triton, which is not")


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, 8, 0)
    with pytest.raises(BackendUnavailable, match=r"^attend/triton needs sm_90, device is sm_80$"):
        BOTH.resolve("triton", CUDA)


def test_amd_gpus_have_no_minimum(monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert BOTH.resolve("triton", CUDA) == BOTH.resolve("auto", CUDA) == "triton"


@pytest.mark.parametrize(
    ("operator", "device", "installed", "message"),
    [
        (REF_ONLY, CUDA, True, "norm/triton has no Triton kernel"),
        (BOTH, CPU, True, "attend/triton needs a GPU, device is cpu"),
        (BOTH, NPU, True, "attend/triton needs a CUDA or ROCm GPU, device is meta"),
        (BOTH, CUDA, False, r"attend/triton needs Triton, .* \(pip install 'model1-llm\[gpu\]'\)"),
    ],
)
def test_triton_is_refused_with_the_reason(
    operator: Operator,
    device: torch.device,
    installed: bool,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_triton(monkeypatch, installed)
    with pytest.raises(BackendUnavailable, match=f"^{message}$"):
        operator.resolve("triton", device)


def test_the_interpreter_runs_triton_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    has_triton(monkeypatch, True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert BOTH.resolve("triton", CPU) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendUnavailable, match="needs a GPU"):
        BOTH.resolve("triton", CPU)


def test_a_plug_in_runs_by_name_everywhere_and_by_itself_on_its_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, ascend=Plugin("meta", attend=abs), other=Plugin("xpu", attend=abs))
    assert BOTH.resolve("ascend", CPU) == BOTH.resolve("auto", NPU) == "ascend"
    assert BOTH.resolve("auto", CPU) == "ref"
    assert BOTH.load("ascend") is abs


def test_what_a_plug_in_lacks_runs_on_ref_unless_it_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, ascend=Plugin("meta", attend=abs))
    assert REF_ONLY.resolve("auto", NPU) == "ref"
    with pytest.raises(
        BackendUnavailable, match=r"^norm/ascend: the plug-in does not provide norm"
    ):
        REF_ONLY.resolve("ascend", NPU)


def test_two_plug_ins_for_one_device_are_a_question(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, b=Plugin("meta", attend=abs), a=Plugin("meta", attend=abs))
    with pytest.raises(
        BackendUnavailable, match=r"^backends a, b all claim meta: name one of them"
    ):
        BOTH.resolve("auto", NPU)
    assert BOTH.resolve("b", NPU) == "b"


def test_an_unknown_name_lists_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, ascend=Plugin("meta"))
    with pytest.raises(
        BackendUnavailable,
        match=r"^backend must be one of auto, ref, triton, hopper, ascend, got 'tritn'$",
    ):
        BOTH.resolve("tritn", CPU)


@pytest.mark.parametrize("name", ["auto", "ref", "triton"])
def test_built_in_names_are_taken(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, **{name: Plugin("meta")})
    with pytest.raises(BackendUnavailable, match=f"may not be called '{name}'"):
        module.plug_ins()


def test_a_broken_plug_in_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> object:
        raise ImportError("no module named torch_npu")

    points = [SimpleNamespace(name="ascend", load=load)]
    monkeypatch.setattr(module, "entry_points", lambda group: points)
    with pytest.raises(BackendUnavailable, match="'ascend' cannot be loaded: no module"):
        module.plug_ins()
    install(monkeypatch, ascend=object())
    with pytest.raises(BackendUnavailable, match="'ascend' needs the attributes"):
        module.plug_ins()


def test_a_module_can_be_a_plug_in() -> None:
    assert isinstance(SimpleNamespace(device_types=frozenset(), operators={}), Backend)


def test_implementations_are_imported_on_first_use() -> None:
    operator = Operator(name="x", implementations={"ref": "no.such.module:f"})
    assert operator.resolve("ref", CPU) == "ref"
    with pytest.raises(ModuleNotFoundError):
        operator.load("ref")
    assert BOTH.load("triton")(-3) == -3


def test_resolve_is_no_part_of_a_compiled_graph() -> None:
    def double(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (2 if BOTH.resolve(name, x.device) == "ref" else 3)

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2), "auto").tolist() == [2.0, 2.0]
