"""Optimisers of the parts of a model, and which parameter belongs to which.

    muon    2-D hidden matrices (and stacks of them)            Muon, weight decay
    embed   token embedding and output head                     AdamW without decay
    scalar  norms, biases, slopes, sinks, short convolutions    AdamW without decay
    mixing  scales and biases of the hyper-connections          the same, at a tenth of the rate
    table   Engram rows                                         row-wise Adam, touched rows only

The split follows DeepSeek-V4 section 2.4 and the Engram paper (arXiv 2601.07372). Table gradients
stay outside global-norm clipping: a few hot rows would otherwise shrink every other step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from model1.errors import ConfigError
from model1.nn.engram import EngramTable
from model1.ops.engram import row_adam_step, sum_equal_rows
from model1.train.config import OptimSection

TABLE_PATTERN = re.compile(r"(^|\.)table\.weight$")
EMBED_PATTERN = re.compile(r"(^|\.)(embed|embed_tokens|embedding|lm_head|head)\.weight$")
SCALAR_PATTERN = re.compile(r"(^|[._])(scale|base|norm|conv|sink|slope|basis|mean|bias)([._]|$)")
# Scalars and biases of the hyper-connections move the residual mixing of every token.
MIXING_PATTERN = re.compile(r"(^|\.)(mhc_\w+|mtp\.head)\.(scale|base)$")
MIXING_LR_SHARE = 0.1
# Quintic Newton-Schulz coefficients that push singular values to [0.7, 1.2] in five steps
# (Jordan et al. 2024, "Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
GROUPS = ("muon", "embed", "scalar", "mixing", "table")

Named = tuple[str, nn.Parameter]


def group_of(name: str, parameter: Tensor) -> str:
    """Group of a parameter by its name and shape: one of GROUPS."""
    if TABLE_PATTERN.search(name):
        return "table"
    if EMBED_PATTERN.search(name):
        return "embed"
    if MIXING_PATTERN.search(name):
        return "mixing"
    if parameter.ndim < 2 or min(parameter.shape) == 1 or SCALAR_PATTERN.search(name):
        return "scalar"
    return "muon"


def newton_schulz(matrices: Tensor) -> Tensor:
    """Nearly orthogonal factor of each matrix: [n, r, c] -> [n, r, c], U V^T of its SVD.

    bf16 on a GPU, fp32 on a CPU. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        # sums inside the products: a x + (b gram + c gram gram) x
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


class Muon:
    """Momentum orthogonalised by Newton-Schulz, all matrices of one shape at once.

    m = mu m + (1 - mu) g;  u = NS((1 - mu) g + mu m)            (Nesterov)
    w = w (1 - lr * decay) - lr * sqrt(max(1, rows / cols)) u

    The scale is Jordan's, for learning rates near 0.02; rows is the output side.
    """

    def __init__(self, named: Sequence[Named], momentum: float, weight_decay: float) -> None:
        self.momentum, self.weight_decay = momentum, weight_decay
        by_shape: dict[torch.Size, list[Named]] = defaultdict(list)
        for name, parameter in named:
            by_shape[parameter.shape].append((name, parameter))
        self.stacks = list(by_shape.values())
        self.buffers = [torch.stack([torch.zeros_like(p) for _, p in s]) for s in self.stacks]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every parameter from its `.grad`; a missing gradient counts as zero."""
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            parameters: list[Tensor] = [p for _, p in stack]
            grads = torch.stack([_grad_or_zero(p) for p in parameters])
            buffer.lerp_(grads, 1.0 - self.momentum)
            update = newton_schulz(grads.lerp_(buffer, self.momentum).flatten(0, -3))
            update = update.view_as(buffer).to(buffer.dtype)
            rows, cols = buffer.shape[-2:]
            scale = max(1.0, rows / cols) ** 0.5
            if self.weight_decay:
                torch._foreach_mul_(parameters, 1.0 - lr * self.weight_decay)
            torch._foreach_add_(parameters, list(update.unbind(0)), alpha=-lr * scale)

    def state(self) -> dict[str, Tensor]:
        """Momentum of each parameter, as views: writing into them restores a state."""
        return {
            f"{name}/momentum": row
            for stack, buffer in zip(self.stacks, self.buffers, strict=True)
            for (name, _), row in zip(stack, buffer.unbind(0), strict=True)
        }


class Adam:
    """Adam without weight decay; every parameter takes part in every step (arXiv 1412.6980)."""

    def __init__(self, named: Sequence[Named], beta1: float, beta2: float) -> None:
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.optimizer = torch.optim.AdamW(
            self.parameters or [nn.Parameter(torch.zeros(1))],
            betas=(beta1, beta2),
            eps=1e-10,
            weight_decay=0.0,
            fused=bool(self.parameters) and self.parameters[0].is_cuda,
        )
        for p in self.parameters:  # made here, not in the first step, so that a resume can fill it
            on_device = p.device if p.is_cuda else torch.device("cpu")
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=on_device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def step(self, lr: float) -> None:
        """Update every parameter from its `.grad`; a missing gradient counts as zero."""
        for p in self.parameters:
            p.grad = _grad_or_zero(p)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """State tensors by name; writing into them restores a state."""
        return {
            f"{name}/{key}": value
            for name, p in zip(self.names, self.parameters, strict=True)
            for key, value in self.optimizer.state[p].items()
        }


class RowAdam:
    """Adam on the rows of lookup tables; a row without gradient keeps every bit.

    A row counts its own steps, so moments and bias correction see only the steps that read it.
    Untouched means that the row's gradient is exactly zero. No weight decay.
    """

    def __init__(self, named: Sequence[Named], beta1: float, beta2: float) -> None:
        self.named, self.beta1, self.beta2, self.eps = list(named), beta1, beta2, 1e-10
        self.moments = [
            (torch.zeros_like(p), torch.zeros_like(p), p.new_zeros(len(p), 1)) for _, p in named
        ]

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the rows of each table that have a gradient."""
        for (_, p), (mean, square, steps) in zip(self.named, self.moments, strict=True):
            if p.grad is None:
                continue
            rows, grads = _row_gradients(p.grad)
            row_adam_step(
                p, mean, square, steps, rows, grads,
                lr=lr, beta1=self.beta1, beta2=self.beta2, eps=self.eps,
            )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """State tensors by name; writing into them restores a state."""
        keys = ("exp_avg", "exp_avg_sq", "steps")
        return {
            f"{name}/{key}": value
            for (name, _), moments in zip(self.named, self.moments, strict=True)
            for key, value in zip(keys, moments, strict=True)
        }


def _row_gradients(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that a table's gradient has, each once, and their gradients.

    A sparse gradient has every row that a step read, as often as it did.
    """
    if grad.layout == torch.sparse_coo:
        # a host that waited for the number of rows would leave the device idle after it
        return sum_equal_rows(grad._indices()[0], grad._values(), is_padded=grad.is_cuda)
    rows = (grad != 0).any(dim=1).nonzero().flatten()
    return rows, grad.index_select(0, rows)


def _grad_or_zero(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


class Optimizer:
    """The optimisers of one model and the clipping in front of them.

    Makes the gradients of its Engram tables sparse.
    """

    def __init__(self, model: nn.Module, settings: OptimSection) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigError("the model has no parameter to train")
        for module in model.modules():
            if isinstance(module, EngramTable):
                module.has_sparse_gradient = True
        self.settings = settings
        self.groups = {g: [(n, p) for n, p in named if group_of(n, p) == g] for g in GROUPS}
        self.clipped = [p for g in GROUPS if g != "table" for _, p in self.groups[g]]
        self.parameters = [p for _, p in named]
        betas = settings.adam_beta1, settings.adam_beta2
        self.muon = Muon(self.groups["muon"], settings.muon_momentum, settings.muon_weight_decay)
        self.embed = Adam(self.groups["embed"], *betas)
        self.scalar = Adam(self.groups["scalar"], *betas)
        self.mixing = Adam(self.groups["mixing"], *betas)
        self.table = RowAdam(self.groups["table"], settings.adam_beta1, settings.table_beta2)

    def clip(self) -> Tensor:
        """Scale all gradients but the tables' to a joint norm of at most clip_norm; the norm."""
        grads = [p.grad for p in self.clipped if p.grad is not None]
        norms = torch._foreach_norm(grads)
        norm = torch.stack([n.float() for n in norms]).norm()
        torch._foreach_mul_(grads, (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def step(self, factor: float) -> None:
        """One update of every group at its learning rate times `factor`; clears gradients."""
        settings = self.settings
        self.muon.step(settings.muon_lr * factor)
        self.embed.step(settings.embed_lr * factor)
        self.scalar.step(settings.scalar_lr * factor)
        self.mixing.step(settings.scalar_lr * MIXING_LR_SHARE * factor)
        self.table.step(settings.table_lr * factor)
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every state tensor by "parameter/key"; writing into them restores a state."""
        parts: Iterable[Muon | Adam | RowAdam] = (
            self.muon, self.embed, self.scalar, self.mixing, self.table,
        )  # fmt: skip
        return {key: value for part in parts for key, value in part.state().items()}
