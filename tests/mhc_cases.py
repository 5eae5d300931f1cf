"""Inputs of the hyper-connection operators' tests, and what a run of them returns."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from model1.testing.compare import assert_close_rows

MARKS = [
    pytest.mark.triton,
    pytest.mark.any_device,
    # the interpreter computes in NumPy, which warns of what Triton does
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS: dict[str, Any] = {"iters": 3, "eps": 1e-6, "norm_eps": 1e-6}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPU_SHAPES = [
    (1, 4, 4096, BF16),
    (17, 4, 7168, BF16),
    (513, 4, 4096, BF16),
    (2050, 4, 1024, BF16),
    (1100, 4, 64, BF16),
    (700, 2, 1024, BF16),
    (515, 8, 1536, BF16),
    (129, 3, 200, BF16),
    (33, 1, 128, BF16),
    (300, 4, 1536, FP16),
    (65, 8, 64, FP16),
    (300, 4, 1536, FP32),
    (65, 8, 200, FP32),
]


def make_inputs(
    t: int, n: int, c: int, dtype: torch.dtype = FP32, *, names: Sequence[str]
) -> dict[str, Tensor]:
    """The named arguments: streams of very different sizes; mixings are far from symmetric."""
    width = n * n + 2 * n
    size = torch.logspace(-1, 1, max(t, 1))[:t]
    tensors = {
        "x": (torch.randn(t, n, c) * size[:, None, None]).to(dtype),
        "y": torch.randn(t, c).to(dtype),
        "pre": torch.rand(t, n),
        "post": torch.rand(t, n) * 2,
        "comb": torch.rand(t, n, n),
        "phi": torch.randn(width, n * c) * (n * c) ** -0.5,
        "scale": torch.rand(width),
        "bias": torch.randn(width),
        "weight": torch.rand(c) + 0.5,
    }
    return {name: tensors[name].to(DEVICE) for name in names}


def run_with_gradients(
    run: Callable[[dict[str, Tensor], str], list[Tensor]], inputs: dict[str, Tensor],
    backend: str, dtype: Any = None,
) -> list[Tensor]:  # fmt: skip
    """Results and gradients of the inputs, all computed in `dtype` if it is given."""
    leaves = {k: v.detach().to(dtype or v.dtype).requires_grad_() for k, v in inputs.items()}
    results = run(leaves, backend)
    torch.manual_seed(2)
    grads = [torch.randn(r.shape).to(r.device, inputs["x"].dtype).to(r.dtype) for r in results]
    return [*results, *torch.autograd.grad(results, list(leaves.values()), grads)]


def assert_follow_the_formula(
    results: dict[str, tuple[Tensor, Tensor, Tensor]], dtype: torch.dtype, *,
    of_streams: Sequence[str], exact: Sequence[str] = (), few: Sequence[str] = (),
    noise: dict[str, float] | None = None,
) -> None:  # fmt: skip
    """Fail unless each result, the plain formula in `dtype` and in fp64 are as near as they can be.

    of_streams: have the dtype of the streams, the others fp32. exact: near fp32 whatever the
    streams are. few: so few numbers that a row of the baseline may be right by luck. noise: of
    single results in place of the usual.
    """
    for name, (out, base, want) in results.items():
        assert out.dtype == (dtype if name in of_streams else FP32), name
        if name in few or out.dim() == 1:
            out, base, want = (tensor.reshape(1, -1) for tensor in (out, base, want))
        base = want if name in exact or dtype == FP32 else base
        # terms of a row of phi's gradient may cancel: fp32 rounds them at their own size
        usual = 1e-6 * want.norm(dim=-1).max().item() if dtype == FP32 else 0.0
        allowed = (noise or {}).get(name, usual)
        try:
            assert_close_rows(out.detach(), base.detach(), want.detach(), noise=allowed)
        except AssertionError as error:
            raise AssertionError(name) from error


def assert_same_bits_in_one_graph(
    run: Callable[[dict[str, Tensor], str], list[Tensor]], inputs: dict[str, Tensor]
) -> None:
    """Fail unless gradients through the kernels are the same where PyTorch compiles the caller."""

    def step(**tensors: Tensor) -> Tensor:
        parts = run({name: 2 * x for name, x in tensors.items()}, "triton")
        return torch.stack([part.square().sum() for part in parts]).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (step, compiled):
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        function(**leaves).backward()
        grads.append([leaf.grad for leaf in leaves.values()])
    for want, got in zip(*grads, strict=True):
        assert want is not None
        assert torch.equal(want, got)


def far_apart(x: Tensor) -> Tensor:
    """x [2, 3, 32] in bf16, its streams and tokens 2^30 numbers and more apart.

    Nothing else is touched of the memory.
    """
    stride = 2**30 + 8
    size = 3 * stride + 128
    if DEVICE == "cpu":
        flat = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=BF16)
    else:
        flat = torch.zeros(size, dtype=BF16, device=DEVICE)
    return flat.as_strided((2, 3, 32), (stride + 64, stride, 1)).copy_(x)
