"""Routed experts from logits to the sum, beside PyTorch's grouped products written plainly."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.activation import swiglu
from model1.ops.moe import moe_experts, moe_route

OPERATOR = "moe"
TESTS = ("tests/ops/test_moe*.py",)
LIMIT = 10.0
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Layer:
    """x [t, c] and logits, and the experts' weights in bf16; logits favour some experts."""

    def __init__(self, t: int, c: int, m: int, e: int, topk: int, device: torch.device) -> None:
        torch.manual_seed(1)
        half = {"dtype": torch.bfloat16, "device": device}
        self.topk = topk
        self.x, self.grad = normal(t, c, **half), normal(t, c, **half)
        self.logits = normal(t, e, **half) + torch.linspace(-0.5, 0.5, e, device=device).bfloat16()
        self.bias = torch.zeros(e, device=device)
        self.gate_up = normal(e, 2 * m, c, **half) * c**-0.5
        self.down = normal(e, c, m, **half) * m**-0.5

    def ours(
        self, backend: str, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor
    ) -> Tensor:
        """Routing and experts, both operators."""
        weights, ids = moe_route(logits, self.bias, topk=self.topk, scaling=2.5)
        return moe_experts(x, weights, ids, gate_up, down, swiglu_limit=LIMIT, backend=backend)

    def plain(self, x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """topk, sort, index, two grouped products, index_add."""
        affinity = F.softplus(logits.float()).clamp(min=1e-30).sqrt()
        ids = (affinity.detach() + self.bias).topk(self.topk, dim=-1).indices
        weights = affinity.gather(-1, ids)
        weights = 2.5 * weights / weights.sum(dim=-1, keepdim=True)
        chosen, order = ids.flatten().sort(stable=True)
        experts = torch.arange(len(self.bias), device=x.device)
        ends = torch.searchsorted(chosen, experts, right=True).to(torch.int32)
        token = order // self.topk
        h = F.grouped_mm(x[token], gate_up.transpose(1, 2), offs=ends)
        gate, up = h.chunk(2, dim=-1)
        y = F.grouped_mm(swiglu(gate, up, LIMIT), down.transpose(1, 2), offs=ends)
        y = y * weights.flatten()[order, None].to(y.dtype)
        return torch.zeros_like(x).index_add(0, token, y)

    def forward(self, run: Run) -> Call:
        """Without gradients."""
        return lambda: (run(self.x, self.logits, self.gate_up, self.down),)

    def training(self, run: Run) -> Call:
        """Forward, and the gradients of everything."""
        leaves = [z.requires_grad_() for z in (self.x, self.logits, self.gate_up, self.down)]

        def call() -> tuple[Tensor, ...]:
            with torch.enable_grad():
                out = run(*leaves)
            return (out.detach(), *torch.autograd.grad(out, leaves, self.grad))

        return call


def layer_work(
    step: str, t: int, c: int, m: int, e: int, topk: int, device: torch.device
) -> Work:  # fmt: skip
    """One step; flop are those of the products."""
    layer = Layer(t, c, m, e, topk, device)
    bind = layer.forward if step == "forward" else layer.training
    flop = 6.0 * t * topk * c * m * (1 if step == "forward" else 3)
    num_bytes = 6 * e * c * m + 4 * t * c
    rivals = {
        "plain grouped_mm": lambda: bind(layer.plain),
        "triton": lambda: bind(functools.partial(layer.ours, "triton")),
    }
    return own_work(bind(functools.partial(layer.ours, "auto")), flop, num_bytes, rivals)


def route_work(t: int, e: int, topk: int, device: torch.device) -> Work:
    """The choice alone: logits in, weights and ids out."""
    logits, bias = normal(t, e, dtype=torch.float32, device=device), torch.zeros(e, device=device)
    call = functools.partial(moe_route, logits, bias, topk=topk, scaling=2.5)
    rivals = {"pytorch": lambda: functools.partial(call, backend="ref")}
    return own_work(call, 0.0, t * (4 * e + 12 * topk), rivals)


def cases() -> Iterator[Case]:
    """64 experts, 6 of them chosen, of 2048 x 1408; many tokens and a decode step."""
    for step in ("forward", "forward+backward"):
        build = functools.partial(layer_work, step, 8192, 2048, 1408, 64, 6)
        yield Case(OPERATOR, f"{step} t=8192 c=2048 m=1408", build)
    build = functools.partial(layer_work, "forward", 64, 2048, 1408, 64, 6)
    yield Case(OPERATOR, "forward t=64 c=2048 m=1408", build)
    yield Case(OPERATOR, "route t=8192 6 of 64", functools.partial(route_work, 8192, 64, 6))
