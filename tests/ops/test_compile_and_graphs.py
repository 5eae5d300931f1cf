"""What every operator owes to PyTorch on a GPU: one node to compile, capture, the right device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from call_cases import CALLS
from call_cases_hopper import HOPPER_CALLS
from calls import Call
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.backend import hopper_refusal

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.triton]
NOT_HERE = hopper_refusal(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
on_hopper = pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}")
EVERY_CALL = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=on_hopper) if name in HOPPER_CALLS else name for name in CALLS],
)


def assert_same_bits(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        bits = [z.detach().cpu().reshape(-1).view(torch.uint8) for z in (x, y)]
        assert torch.equal(*bits)


def with_gradients(call: Call, run: Any) -> list[Tensor]:
    """Results of a run on copies of the call's tensors, gradients, and the copies afterwards."""
    tensors = {name: x.detach().clone() for name, x in call.tensors.items()}
    leaves = [tensors[name].requires_grad_() for name in call.differentiable]
    returned = run(**tensors)
    results = [returned] if isinstance(returned, Tensor) else list(returned or ())
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        torch.manual_seed(1)
        gradient = torch.randn(results[0].shape).to(results[0])
        gradients = torch.autograd.grad(results[0], leaves, gradient)
    return [*results, *gradients, *tensors.values()]


@EVERY_CALL
def test_compiled_as_one_graph_it_has_the_same_bits(name: str) -> None:
    call = CALLS[name](0)
    torch.compiler.reset()  # compilations of one function count together, and helpers are shared
    compiled = torch.compile(call.run, fullgraph=True, backend="aot_eager")
    assert_same_bits(with_gradients(call, compiled), with_gradients(call, call.run))


class Recorder(TorchDispatchMode):
    """Keeps the library's operators that run within it, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "model1":
            assert not kwargs
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@EVERY_CALL
def test_the_operator_describes_itself_to_pytorch(name: str) -> None:
    call = CALLS[name](0)
    leaves = {x: call.tensors[x].requires_grad_() for x in call.differentiable}
    with Recorder() as recorder:
        call.run(**(call.tensors | leaves))
    assert recorder.calls
    for operator, arguments in recorder.calls:
        dtypes = {x.dtype for x in arguments if isinstance(x, Tensor)}
        if torch.float8_e4m3fn in dtypes:  # the other checks compute with their arguments
            torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        else:
            torch.library.opcheck(operator, arguments)


@EVERY_CALL
def test_a_replayed_graph_reads_other_inputs(name: str) -> None:
    static = CALLS[name](0)
    static.results(static.tensors)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = static.results(static.tensors)
    for seed in (1, 2, 0):
        tensors = CALLS[name](seed).tensors
        for x, y in zip(static.tensors.values(), tensors.values(), strict=True):
            x.copy_(y)
        graph.replay()
        want = static.results(tensors)
        assert_same_bits([*got, *static.tensors.values()], [*want, *tensors.values()])


@EVERY_CALL
def test_inputs_on_another_gpu_than_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    here = CALLS[name](0)
    with torch.cuda.device(1):
        there = CALLS[name](0)
    assert torch.cuda.current_device() == 0
    assert {x.device for x in there.tensors.values()} == {torch.device("cuda", 1)}
    want, got = here.results(here.tensors), there.results(there.tensors)
    assert_same_bits([*got, *there.tensors.values()], [*want, *here.tensors.values()])
