"""The Triton kernels of MHA prefill: interpreted here in small sizes, on a GPU in the models'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from mha_prefill_cases import (
    NAMES,
    Case,
    Shape,
    check,
    check_batch_invariance,
    drawn_case,
    drawn_shape,
    random_case,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.compile_cases import KernelTarget
from model1.ops.mha_prefill import mha_prefill
from model1.ops.mha_prefill.portable_sizes import Config, choose_config

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.mha_prefill.portable import mha_prefill_backward_triton, mha_prefill_triton

# Triton's interpreter turns the bounds of loops into integers in a way that NumPy will forbid.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
# Without a GPU the kernels run in Triton's interpreter, which a GPU build does not offer.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same kernels")
CONFIGS = [Config(16, 16, 4, 1), Config(16, 32, 4, 1, 16), Config(32, 16, 4, 1, 32)]
INTERPRETED_SHAPES = [
    Shape(h=1, hkv=1, d=8, dv=8),
    Shape(h=2, hkv=1, d=40, dv=24, causal=True),
    Shape(h=2, hkv=2, d=96, dv=70, causal=True),
    Shape(h=2, hkv=1, d=16, dv=16, dtype=torch.float16),
]
_BF16: dict[str, Any] = {"dtype": torch.bfloat16}
GPU_SHAPES = [
    Shape(h=4, hkv=4, d=192, dv=128, causal=True, **_BF16),
    Shape(h=4, hkv=4, d=192, dv=128, **_BF16),
    Shape(h=8, hkv=2, d=192, dv=128, causal=True, dtype=torch.float16),
    Shape(h=4, hkv=4, d=128, dv=128, causal=True, **_BF16),
    Shape(h=6, hkv=3, d=128, dv=128, dtype=torch.float16),
    Shape(h=6, hkv=1, d=224, dv=224, causal=True, **_BF16),
    Shape(h=4, hkv=1, d=512, dv=512, causal=True, **_BF16),
    Shape(h=4, hkv=1, d=576, dv=512, causal=True, **_BF16),
    Shape(h=3, hkv=3, d=64, dv=80, **_BF16),
    Shape(h=2, hkv=1, d=100, dv=36, causal=True),
]
CASES_PER_GPU_SHAPE = 52
DEVICES = [
    pytest.param("cpu", marks=interpreted, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def run(case: Case, config: Config | None = None) -> dict[str, Tensor]:
    """Forward and backward kernels, with sizes that the public function would not take."""
    arguments = case.arguments()
    tensors = [arguments.pop(name).detach() for name in "qkv"]
    lengths = [arguments.pop(f"cu_seqlens_{axis}") for axis in "qk"]
    longest = [arguments.pop(f"max_seqlen_{axis}") for axis in "qk"]
    results = mha_prefill_triton(*tensors, *lengths, *longest, **arguments, config=config)
    gradients = mha_prefill_backward_triton(
        case.d_out, *tensors, *lengths, *results, *longest, **arguments,
        configs=None if config is None else (config, config),
    )  # fmt: skip
    return dict(zip(NAMES, (*results, *gradients), strict=True))


def differentiated(case: Case) -> dict[str, Tensor]:
    """The same through the public function."""
    arguments = case.arguments()
    out, lse = mha_prefill(**arguments, backend="triton")
    gradients = torch.autograd.grad(out, [arguments[name] for name in "qkv"], case.d_out)
    return dict(zip(NAMES, (out.detach(), lse, *gradients), strict=True))


@interpreted
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", INTERPRETED_SHAPES, ids=str)
def test_interpreted_kernels_compute_the_formula(shape: Shape, config: Config) -> None:
    case = random_case(shape, [35, 0, 3, 2], [20, 4, 37, 0], 0)
    check(case, run(case, config), "interpreted")


@interpreted
def test_the_public_function_differentiates_the_kernels() -> None:
    case = random_case(INTERPRETED_SHAPES[1], [5, 3], [4, 7], 0)
    check(case, differentiated(case), "differentiated")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(GPU_SHAPES)))
def test_random_cases_on_a_gpu(number: int) -> None:
    for idx in range(CASES_PER_GPU_SHAPE):
        seed = number * CASES_PER_GPU_SHAPE + idx
        case = drawn_case(GPU_SHAPES[number], seed, longest=700, device="cuda")
        check(case, differentiated(case), f"case {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(1000, 1012))
def test_random_shapes_on_a_gpu(number: int) -> None:
    shape = drawn_shape(number)
    for seed in range(10 * number, 10 * number + 10):
        case = drawn_case(shape, seed, longest=300, device="cuda")
        check(case, differentiated(case), f"{shape}, case {seed}")


def _case(device: str, **options: Any) -> Case:
    sizes: dict[str, Any] = {"h": 2, "hkv": 1, "d": 24, "dv": 16, "causal": True}
    if device == "cuda":
        sizes |= {"h": 8, "hkv": 4, "d": 192, "dv": 128, "dtype": torch.bfloat16}
    return random_case(Shape(**(sizes | options)), [17, 0, 9], [20, 4, 5], 0, device)


@pytest.mark.parametrize("device", DEVICES)
def test_results_are_the_same_bits_every_time(device: str) -> None:
    case = _case(device)
    first, second = run(case), run(case)
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_requests_do_not_see_each_other(device: str) -> None:
    case = _case(device)
    want = run(case)
    case.k[:20], case.v[:20] = float("nan"), float("nan")
    got = run(case)
    for name, first in (("out", 17), ("lse", 17), ("dq", 17), ("dk", 20), ("dv", 20)):
        assert torch.equal(got[name][first:], want[name][first:]), name
    assert got["out"][16].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_one_has_the_bits_of_the_batch(device: str) -> None:
    case = _case(device)
    want = run(case)
    alone = Case(
        case.q[17:], case.k[24:], case.v[24:], case.d_out[17:], [9], [5], case.softmax_scale,
        case.causal,
    )  # fmt: skip
    got = run(alone)
    for name in NAMES:
        first = 24 if name in ("dk", "dv") else 17
        assert torch.equal(got[name], want[name][first:]), name


@pytest.mark.parametrize("device", DEVICES)
def test_requests_know_neither_order_nor_number_of_their_mates(device: str) -> None:
    check_batch_invariance(_case(device), run)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_the_ops_describe_themselves_to_pytorch(device: str) -> None:
    case = _case(device)
    a = case.arguments()
    lengths = (a["cu_seqlens_q"], a["cu_seqlens_k"], 17, 20)
    tensors = tuple(a[name].detach() for name in "qkv")
    ops = torch.ops.model1
    torch.library.opcheck(ops.mha_prefill.default, (*tensors, *lengths, 0.3, True, "triton"))
    out, lse = ops.mha_prefill(*tensors, *lengths, 0.3, True, "triton")
    torch.library.opcheck(
        ops.mha_prefill_backward.default,
        (case.d_out, *tensors, *lengths[:2], out, lse, *lengths[2:], 0.3, True, "triton"),
    )


def test_heads_that_a_gpu_cannot_hold_are_refused() -> None:
    for kernel in ("fwd", "dq", "dkdv"):
        with pytest.raises(BackendUnavailable, match=r"takes 576 channels of .*bfloat16, got 600"):
            choose_config(kernel, KernelTarget("cuda", 90), 600, torch.bfloat16)
        with pytest.raises(BackendUnavailable, match=r"takes 256 channels of .*float32, got 300"):
            choose_config(kernel, KernelTarget("cuda", 89), 300, torch.float32)
        assert choose_config(kernel, KernelTarget("cuda", 90), 300, torch.float32).block_m == 16


@pytest.mark.gpu
def test_a_long_request_on_a_gpu() -> None:
    shape = Shape(h=2, hkv=1, d=192, dv=128, dtype=torch.bfloat16, causal=True)
    case = random_case(shape, [4099], [5003], 0, "cuda")
    check(case, differentiated(case), "long")
