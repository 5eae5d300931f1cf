"""The loss over a large vocabulary, forward and backward, beside PyTorch's own ways.

FLOP are those of the three products, each counted once: the checkpointed rivals make the logits
twice. Bytes are those of states, weights and their gradients; logits need not be moved.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.case import Call, Case, Work, own_work
from benchmarks.kernel_inputs import normal
from model1.ops.cross_entropy import linear_cross_entropy

OPERATOR = "cross_entropy"
TESTS = ("tests/ops/test_cross_entropy_kernel.py",)
CHUNK_TOKENS = 16384  # the trainer's default
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once, in fp32 for the softmax."""
    logits = hidden @ weight.to(hidden.dtype).T
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def checkpointed(chunk_loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Chunks whose logits are made again in the backward pass."""
    total = hidden.new_zeros((), dtype=torch.float32)
    chunks = zip(hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
    for part, wanted in chunks:
        loss = checkpoint(
            chunk_loss, part, weight, wanted, use_reentrant=False, preserve_rng_state=False
        )
        assert isinstance(loss, Tensor)
        total = total + loss
    return total


def loss_work(n: int, c: int, vocab: int, has_gradient: bool, device: torch.device) -> Work:
    """bf16 states and an fp32 master weight, as in training."""
    torch.manual_seed(1)
    hidden = normal(n, c, dtype=torch.bfloat16, device=device)
    weight = normal(vocab, c, dtype=torch.float32, device=device, scale=0.02)
    targets = torch.randint(vocab, (n,), device=device)
    leaves = [x.requires_grad_(has_gradient) for x in (hidden, weight)]

    def bind(run: Loss) -> Call:
        def call() -> tuple[Tensor, ...]:
            with torch.set_grad_enabled(has_gradient):
                loss = run(hidden, weight, targets)
            if not has_gradient:
                return (loss,)
            d_hidden, d_weight = torch.autograd.grad(loss / n, leaves)
            return d_weight, d_hidden, loss.detach()

        return call

    def ours(*tensors: Tensor, chunk_tokens: int = CHUNK_TOKENS) -> Tensor:
        return linear_cross_entropy(*tensors, chunk_tokens=chunk_tokens, backend="triton")

    def compiled() -> Call:
        chunk_loss = torch.compile(plain, fullgraph=True, dynamic=False)
        return bind(functools.partial(checkpointed, chunk_loss))

    rivals = {
        "checkpointed, compiled": compiled,
        "checkpointed": lambda: bind(functools.partial(checkpointed, plain)),
        "F.cross_entropy": lambda: bind(plain),
        "ours, chunks of 4096": lambda: bind(functools.partial(ours, chunk_tokens=4096)),
        "ours, chunks of 65536": lambda: bind(functools.partial(ours, chunk_tokens=65536)),
    }
    num_passes = 3 if has_gradient else 1
    num_bytes = (2 * n * c + 4 * vocab * c) * (2 if has_gradient else 1)
    return own_work(bind(ours), 2.0 * n * c * vocab * num_passes, num_bytes, rivals)


def cases() -> Iterator[Case]:
    """Tokens of a large micro-batch and a 100M-parameter model's width."""
    for vocab in (32000, 50257):
        for has_gradient in (True, False):
            step = "forward+backward" if has_gradient else "forward"
            build = functools.partial(loss_work, 65536, 768, vocab, has_gradient)
            yield Case(OPERATOR, f"{step} n=65536 c=768 vocab={vocab}", build)
