"""Cross-entropy of a linear map, reference and Triton: fp64, gradients, hostile logits, PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engram_cases import DEVICE
from torch import Tensor

from model1.ops.cross_entropy import has_kernel, linear_cross_entropy
from model1.ops.cross_entropy.ref import linear_cross_entropy_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
BOTH = pytest.mark.parametrize("backend", ["ref", "triton"])
SIZES = [(13, 16, 5), (7, 24, 1000), (3, 8, 50257), (1, 9, 1), (64, 8, 64)]
if torch.cuda.is_available():
    SIZES += [(1001, 768, 32000), (301, 768, 50257), (33, 64, 262144)]
# The interpreter's bf16 products are PyTorch's own; its rounding is that of the kernels.
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        yield


def inputs(n: int, c: int, vocab: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """States, fp32 weights and targets, every fourth of them ignored."""
    targets = torch.randint(vocab, (n,))
    targets[1::4] = -100
    weight = torch.randn(vocab, c) * c**-0.5
    return [torch.randn(n, c).to(DEVICE, dtype), weight.to(DEVICE), targets.to(DEVICE)]


def results(
    backend: str, tensors: list[Tensor], chunk: int, factor: float = 0.3
) -> tuple[Tensor, ...]:
    """Loss and gradients of factor * loss."""
    hidden, weight = (x.detach().requires_grad_() for x in tensors[:2])
    loss = linear_cross_entropy(hidden, weight, tensors[2], chunk_tokens=chunk, backend=backend)
    return loss.detach(), *torch.autograd.grad(factor * loss, (hidden, weight))


def plain(tensors: list[Tensor], dtype: torch.dtype, factor: float = 0.3) -> tuple[Tensor, ...]:
    """The same by F.cross_entropy, products in dtype."""
    hidden, weight = (x.detach().requires_grad_() for x in tensors[:2])
    logits = hidden.to(dtype) @ weight.to(dtype).T
    wide = torch.promote_types(dtype, torch.float32)
    loss = F.cross_entropy(logits.to(wide), tensors[2], reduction="sum")
    return loss.detach(), *torch.autograd.grad(factor * loss, (hidden, weight))


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "c", "vocab"), SIZES)
def test_equals_pytorch_in_float64(
    n: int, c: int, vocab: int, dtype: torch.dtype, backend: str
) -> None:
    tensors = inputs(n, c, vocab, dtype)
    got, baseline = results(backend, tensors, 5), plain(tensors, dtype)
    rounded = [tensors[0], tensors[1].to(dtype), tensors[2]]
    wide = [x.double() if x.is_floating_point() else x for x in rounded]
    expected = plain(wide, torch.float64)
    assert [x.dtype for x in got] == [torch.float32, dtype, torch.float32]
    # a sum of n losses rounds by luck; each logit's own rounding bounds it
    limit = 3 * n**0.5 * torch.finfo(dtype).eps + 1e-5 * abs(float(expected[0]))
    assert abs(float(got[0]) - float(expected[0])) <= limit
    for x, base, y in zip(got[1:], baseline[1:], expected[1:], strict=True):
        # two roundings, of the gradient of 1 and of the product, where the baseline has one
        spread = torch.finfo(dtype).eps * y.double().norm(dim=-1)
        assert_close_rows(x, base, y, noise=spread)


@BOTH
def test_chunks_change_nothing_but_the_order_of_sums(backend: str) -> None:
    tensors = inputs(13, 16, 70)
    want = results(backend, tensors, 13)
    for chunk in (1, 4, 5, 100):
        for x, y in zip(results(backend, tensors, chunk), want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_the_reference_in_fp64_is_differentiated_right() -> None:
    hidden, weight, targets = inputs(5, 4, 7)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, chunk_tokens=2, backend="ref")

    assert torch.autograd.gradcheck(run, leaves)


@BOTH
def test_nothing_to_learn_is_zero(backend: str) -> None:
    hidden, weight, targets = inputs(6, 8, 9)
    for x in ([hidden, weight, targets.fill_(-100)], [hidden[:0], weight, targets[:0]]):
        loss, d_hidden, d_weight = results(backend, x, 4)
        assert float(loss) == 0.0
        assert d_hidden.shape == x[0].shape
        assert torch.equal(d_hidden, torch.zeros_like(x[0]))
        assert torch.equal(d_weight, torch.zeros_like(weight))


def hostile() -> list[Tensor]:
    """Logits that are the weights themselves: hidden states are unit vectors."""
    rows = torch.randn(8, 70)
    rows[0, 3] = 1e4
    rows[1] *= 1e4
    rows[2, :65] = -math.inf
    rows[3, 7] = math.nan
    rows[4, 69] = math.inf
    rows[5] = -math.inf
    rows[6, 2] = -math.inf
    targets = torch.tensor([3, 5, 66, 1, 2, 0, 2, -100])
    return [torch.eye(8).to(DEVICE), rows.T.contiguous().to(DEVICE), targets.to(DEVICE)]


@BOTH
def test_hostile_logits_give_what_pytorch_gives(backend: str) -> None:
    """Row by row; products with the other weights would spread NaN, so the logits come alone."""
    _, weight, targets = hostile()
    for row in range(8):
        logits = weight[:, row : row + 1].contiguous()
        one = [torch.ones(1, 1).to(DEVICE), logits, targets[row : row + 1]]
        got = results(backend, one, 3, factor=1.0)
        leaf = logits.T.contiguous().requires_grad_()
        loss = F.cross_entropy(leaf, one[2], reduction="sum")
        (d_logits,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(got[0], loss.detach(), equal_nan=True)
        torch.testing.assert_close(got[2], d_logits.T, equal_nan=True, rtol=1e-5, atol=1e-6)


@BOTH
def test_a_bad_row_spoils_no_other_row(backend: str) -> None:
    tensors = inputs(6, 8, 70)
    want = results(backend, tensors, 4)[1]
    tensors[0][2] = math.nan
    loss, got, _ = results(backend, tensors, 4)
    assert loss.isnan()
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert torch.equal(got[others], want[others])
    assert got[2].isnan().all()


@BOTH
def test_an_ignored_row_may_have_any_logits(backend: str) -> None:
    tensors = inputs(3, 8, 70)
    tensors[0][1] = 3e38  # logits overflow
    loss, d_hidden, d_weight = results(backend, tensors, 2)
    assert all(bool(x.isfinite().all()) for x in (loss, d_hidden, d_weight))
    assert bool((d_hidden[1] == 0).all())


def test_a_target_outside_gives_nan_where_it_is_not_refused() -> None:
    hidden, weight, targets = inputs(4, 8, 70)
    targets[2] = 70
    targets[3] = -1
    run = torch.ops.model1.linear_cross_entropy
    for backend in ("ref", "triton"):
        loss, d_hidden, _ = run(hidden, weight, targets, 3, True, True, backend)
        assert loss.isnan()
        assert d_hidden[2:].isnan().all()
        assert d_hidden[:2].isfinite().all()


def test_the_same_bits_every_time_and_for_any_strides() -> None:
    tensors = inputs(13, 16, 300)
    want = results("triton", tensors, 5)
    apart = [
        tensors[0].T.contiguous().T,
        tensors[1].T.contiguous().T,
        torch.stack([tensors[2]] * 2, 1)[:, 0],
    ]
    for x, y in zip(results("triton", tensors, 5), want, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(results("triton", apart, 5), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@BOTH
def test_only_what_is_asked_for_is_computed(backend: str) -> None:
    hidden, weight, targets = inputs(5, 8, 70)
    want = results(backend, [hidden, weight, targets], 2, factor=1.0)
    run = torch.ops.model1.linear_cross_entropy
    for needs in ((False, False), (True, False), (False, True)):
        loss, d_hidden, d_weight = run(hidden, weight, targets, 2, *needs, backend)
        torch.testing.assert_close(loss, want[0], rtol=1e-6, atol=0)  # another kernel
        assert torch.equal(d_hidden, want[1]) if needs[0] else d_hidden.numel() == 0
        assert torch.equal(d_weight, want[2]) if needs[1] else d_weight.numel() == 0


def test_autocast_changes_nothing() -> None:
    hidden, weight, targets = inputs(5, 8, 70)
    want = linear_cross_entropy(hidden, weight, targets, chunk_tokens=2, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = linear_cross_entropy(hidden, weight, targets, chunk_tokens=2, backend="triton")
    assert torch.equal(got, want)


@BOTH
def test_one_graph_under_torch_compile(backend: str) -> None:
    hidden, weight, targets = inputs(5, 8, 70)

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        loss = linear_cross_entropy(2 * hidden, weight, targets, chunk_tokens=2, backend=backend)
        return loss / 5

    grads = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        grads.append(torch.autograd.grad(run(*leaves), leaves))
    for x, y in zip(*grads, strict=True):
        assert torch.equal(x, y)


@BOTH
def test_opcheck(backend: str) -> None:
    hidden, weight, targets = inputs(5, 8, 70)
    for needs in ((False, False), (True, True)):
        leaves = [x.detach().requires_grad_(needs[0]) for x in (hidden, weight)]
        arguments = (*leaves, targets, 2, *needs, backend)
        torch.library.opcheck(torch.ops.model1.linear_cross_entropy, arguments)


def test_bad_arguments_name_value_and_rule() -> None:
    hidden, weight, targets = inputs(4, 8, 9)
    for message, arguments in (
        (r"hidden must be \[n, c\], got \[4\]", (hidden[:, 0], weight, targets)),
        (r"weight must be \[vocab, 8\], .* got \[9, 7\]", (hidden, weight[:, :7], targets)),
        (r"weight must be .*vocab > 0, got \[0, 8\]", (hidden, weight[:0], targets)),
        (r"targets must be \[4\] int64, got \[3\]", (hidden, weight, targets[:3])),
        (r"targets must be .* got \[4\] torch\.int32", (hidden, weight, targets.int())),
        (r"targets must be on hidden's device", (hidden, weight, targets.to("meta"))),
        (r"weight must be float32 or torch\.float32", (hidden, weight.half(), targets)),
        (r"hidden must be bfloat16, .* got torch\.float64", (hidden.double(), weight, targets)),
        (r"hidden must be floating point, got .*int64", (hidden.long(), weight, targets)),
    ):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*arguments, chunk_tokens=2, backend="triton")
    with pytest.raises(ValueError, match="chunk_tokens must be at least 1, got 0"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    for wrong in (9, -1):
        targets[2] = wrong
        rule = rf"targets must be -100 or in \[0, 9\), got {wrong} in row 2"
        with pytest.raises(ValueError, match=rule):
            linear_cross_entropy(hidden.cpu(), weight.cpu(), targets.cpu(), chunk_tokens=2)


def test_the_reference_serves_fp64_and_cpus() -> None:
    hidden = torch.randn(2, 4)
    assert not has_kernel(hidden)
    assert not has_kernel(hidden.to(DEVICE).double())
    assert has_kernel(hidden.to(DEVICE)) == (DEVICE == "cuda")
    loss, _, _ = linear_cross_entropy_ref(
        hidden.double(), torch.randn(3, 4).double(), torch.tensor([0, -100]),
        chunk_tokens=2, needs_hidden=False, needs_weight=False,
    )  # fmt: skip
    assert loss.dtype == torch.float64
