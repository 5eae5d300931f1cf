"""Hyper-connections of one sublayer, beside the bandwidth of a copy: each stream moves once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.mhc import MhcCoefficients, mhc_coefficients, mhc_collapse, mhc_write_back
from model1.ops.mhc.chain import mhc_collapse_norm, mhc_seam
from model1.ops.mhc.single_pass import mhc_write_back_collapse_norm

OPERATOR = "mhc"
TESTS = ("tests/ops/test_mhc*.py",)
NUM_STREAMS = 4
OPTIONS = {"iters": 20, "eps": 1e-6, "norm_eps": 1e-6}
# Together the copies of the inputs are larger than any cache, so that no call finds its own there.
_COPIED_BYTES = 256 << 20
Step = Callable[["Sublayer"], tuple[Tensor, ...]]


class Sublayer:
    """Streams [t, 4, c] and a sublayer's output [t, c] in bf16, with parameters in fp32."""

    def __init__(self, t: int, c: int, device: torch.device) -> None:
        n = NUM_STREAMS
        width = n * n + 2 * n
        self.x = normal(t, n, c, dtype=torch.bfloat16, device=device)
        self.y = normal(t, c, dtype=torch.bfloat16, device=device)
        self.phi = torch.randn(width, n * c, device=device) * (n * c) ** -0.5
        self.scale, self.bias = (torch.full((width,), 0.5, device=device) for _ in range(2))
        self.norm_weight = torch.ones(c, device=device)
        self.weights = MhcCoefficients(*(w.clone() for w in self.coefficients()))

    def coefficients(self) -> MhcCoefficients:
        """Reads the streams alone."""
        return mhc_coefficients(self.x, self.phi, self.scale, self.bias, **OPTIONS)

    def collapse(self) -> tuple[Tensor, ...]:
        """What the sublayer reads."""
        return (mhc_collapse(self.x, self.weights.pre),)

    def write_back(self) -> tuple[Tensor, ...]:
        """The streams after the sublayer."""
        return (mhc_write_back(self.x, self.y, self.weights.post, self.weights.comb),)

    def forward(self) -> tuple[Tensor, ...]:
        """All three."""
        weights = self.coefficients()
        collapsed = mhc_collapse(self.x, weights.pre)
        return collapsed, mhc_write_back(self.x, self.y, weights.post, weights.comb)

    def backward(self) -> tuple[Tensor, ...]:
        """Forward, then the gradient of everything that the sublayer reads."""
        inputs = (self.x, self.y, self.phi, self.scale, self.bias)
        for tensor in inputs:
            tensor.requires_grad_()
        with torch.enable_grad():
            results = self.forward()
        return torch.autograd.grad(results, inputs, (self.y.detach(), self.x.detach()))

    def collapse_norm(self) -> tuple[Tensor, ...]:
        """What the sublayer reads, normalised."""
        norm_eps = OPTIONS["norm_eps"]
        return mhc_collapse_norm(self.x, self.weights.pre, self.norm_weight, norm_eps=norm_eps)

    def collapse_norm_backward(self) -> tuple[Tensor, ...]:
        """The same, then the gradient of everything that it reads; x is passed on."""
        return self._gradients(self.collapse_norm, (self.x, self.weights.pre, self.norm_weight))

    def write_back_backward(self) -> tuple[Tensor, ...]:
        """The streams after the sublayer, then the gradient of everything that it reads."""
        weights = self.weights
        return self._gradients(self.write_back, (self.x, self.y, weights.post, weights.comb))

    def seam(self) -> tuple[Tensor, ...]:
        """All that a sublayer in a row costs: from its result to what the next one starts from."""
        return mhc_seam(
            self.x, self.y, self.weights.post, self.weights.comb, self.phi, self.scale, self.bias,
            self.norm_weight, **OPTIONS,
        )  # fmt: skip

    def seam_backward(self) -> tuple[Tensor, ...]:
        """The seam, then the gradient of everything that it reads."""
        weights = self.weights
        mixing = (weights.post, weights.comb, self.phi, self.scale, self.bias, self.norm_weight)
        return self._gradients(self.seam, (self.x, self.y, *mixing))

    def _gradients(
        self, run: Callable[[], tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """Of inputs, from gradients of the results that are like these."""
        for tensor in inputs:
            tensor.requires_grad_()
        with torch.enable_grad():
            results = run()
        likes = (self.x, self.y, self.weights.post, self.weights.comb)
        grads = [next(o for o in likes if o.shape == r.shape).detach() for r in results]
        return torch.autograd.grad(results, inputs, grads)

    def single_pass(self) -> tuple[Tensor, ...]:
        """Write-back, the next collapse by weights known before, and norm."""
        weights, norm_eps = self.weights, OPTIONS["norm_eps"]
        return mhc_write_back_collapse_norm(
            self.x, self.y, weights.post, weights.comb, weights.pre, self.norm_weight,
            norm_eps=norm_eps,
        )  # fmt: skip

    def single_pass_backward(self) -> tuple[Tensor, ...]:
        """The same, then the gradient of everything that it reads."""
        inputs = (self.x, self.y, self.norm_weight, *self.weights)
        return self._gradients(self.single_pass, inputs)

    def single_pass_step(self) -> tuple[Tensor, ...]:
        """All that a sublayer in a row costs in that form: its coefficients as well."""
        weights = self.coefficients()
        return mhc_write_back_collapse_norm(
            self.x, self.y, weights.post, weights.comb, weights.pre, self.norm_weight,
            norm_eps=OPTIONS["norm_eps"],
        )  # fmt: skip

    def single_pass_step_backward(self) -> tuple[Tensor, ...]:
        """The step, then the gradient of everything that it reads."""
        inputs = (self.x, self.y, self.norm_weight, self.phi, self.scale, self.bias)
        return self._gradients(self.single_pass_step, inputs)


# Streams' worth of channels [t, c] that a step reads and writes: x and the result of each part.
STEPS: dict[str, tuple[Step, int]] = {
    "coefficients": (Sublayer.coefficients, NUM_STREAMS),
    "collapse": (Sublayer.collapse, NUM_STREAMS + 1),
    "write-back": (Sublayer.write_back, 2 * NUM_STREAMS + 1),
    "forward": (Sublayer.forward, 2 * NUM_STREAMS + 2),
    # as forward, then x, y and both gradients in, the gradients of x and y out
    "forward+backward": (Sublayer.backward, 5 * NUM_STREAMS + 5),
    "write-back+backward": (Sublayer.write_back_backward, 5 * NUM_STREAMS + 3),
    "collapse+norm": (Sublayer.collapse_norm, NUM_STREAMS + 1),
    # then x and both gradients in, that of x out
    "collapse+norm+backward": (Sublayer.collapse_norm_backward, 4 * NUM_STREAMS + 2),
    "seam": (Sublayer.seam, 2 * NUM_STREAMS + 2),
    # then x, y, the new streams and both gradients in, those of x and y out
    "seam+backward": (Sublayer.seam_backward, 6 * NUM_STREAMS + 5),
    "single pass": (Sublayer.single_pass, 2 * NUM_STREAMS + 2),
    # then x, y, the new streams and both gradients in, those of x and y out
    "single pass+backward": (Sublayer.single_pass_backward, 6 * NUM_STREAMS + 5),
    # as the single pass, for a pass that weighs the new streams for the next one as it writes them
    "single-pass step": (Sublayer.single_pass_step, 2 * NUM_STREAMS + 2),
    "single-pass step+backward": (Sublayer.single_pass_step_backward, 6 * NUM_STREAMS + 5),
}


def step_work(name: str, t: int, c: int, device: torch.device) -> Work:
    """One step over t tokens; parameters and weights, which are small, are not counted."""
    torch.manual_seed(1)
    step, num_rows = STEPS[name]
    num_copies = max(1, _COPIED_BYTES // (2 * t * c * (NUM_STREAMS + 1)))
    turns = itertools.cycle([Sublayer(t, c, device) for _ in range(num_copies)])
    return own_work(lambda: step(next(turns)), 0.0, 2 * t * c * num_rows)


def cases() -> Iterator[Case]:
    """Prefill or a training step of large models' widths, and a training step of a small one's."""
    for t, c in ((65536, 768), (8192, 4096), (16384, 7168)):
        for name in STEPS:
            yield Case(OPERATOR, f"{name} t={t} c={c}", functools.partial(step_work, name, t, c))
