"""The cross-entropy of a linear map around one Triton kernel, chunk by chunk.

PyTorch multiplies; the kernel turns a chunk's logits into losses and, in place, into their
gradients. A program owns a row and goes over it twice, the second time backwards: what it read last
is still in a cache.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.cross_entropy.checks import IGNORE
from model1.ops.launch import launch_options
from model1.ops.rounding import round_to

# Rows of logits start at multiples of this and products are this wide, with zeros at the end: of a
# width like 50257 no row but the first lies where matrix units and wide loads want it.
COLUMN_STEP = 64


@dataclass(frozen=True)
class Config:
    """How a row is cut. Other cuts were not measured.

    Warps are many so that rows in flight are few: their logits should stay in the L2 cache from the
    first pass to the second.
    """

    block: int = 8192  # logits of a step
    elements: int = 16  # of them in a thread of 32 a warp

    def options(self, num_columns: int) -> dict[str, Any]:
        """Block and warps for rows of this width."""
        block = min(self.block, 1 << (num_columns - 1).bit_length())
        return {"BLOCK": block} | launch_options(max(1, block // (32 * self.elements)), 1)


@triton.jit
def _linear_cross_entropy_kernel(
    logits_ptr, stride_logits, targets_ptr, losses_ptr, vocab,
    IGNORED: tl.constexpr, HAS_GRADIENT: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss of row program_id; HAS_GRADIENT: its gradient over stride_logits columns in place."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(targets_ptr + row)
    is_known = (target >= 0) & (target < vocab)
    otherwise = tl.where(target == IGNORED, 0.0, float("nan"))
    wanted = tl.load(row_ptr + target, mask=is_known, other=0.0).to(tl.float32)
    largest = float("-inf")
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.where(is_known, vocab, 0), BLOCK):
        column = first + offs
        # masked at the stride, a multiple of 16, so that loads are wide; what lies behind the
        # vocabulary is not a logit
        x = tl.load(row_ptr + column, mask=column < stride_logits, other=0.0).to(tl.float32)
        x = tl.where(column < vocab, x, float("-inf"))
        larger = tl.maximum(largest, tl.max(x, axis=0))
        # nothing but -inf so far: any finite base keeps the sum at 0
        base = tl.where(larger == float("-inf"), 0.0, larger)
        sums = sums * tl.exp(largest - base) + tl.exp(x - base)
        largest = larger
    total = tl.sum(sums, axis=0)
    # in this order large logits cancel before they are rounded
    loss = tl.log(total) - (wanted - largest)
    tl.store(losses_ptr + row, tl.where(is_known, loss, otherwise))
    if HAS_GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit
        inverse = 1.0 / total
        num_blocks = tl.cdiv(stride_logits, BLOCK)
        for step in range(0, num_blocks):
            column = (num_blocks - 1 - step) * BLOCK + offs
            mask = column < stride_logits
            x = tl.load(row_ptr + column, mask=mask & is_known, other=0.0).to(tl.float32)
            d = tl.exp(x - largest) * inverse - tl.where(column == target, 1.0, 0.0)
            d = tl.where(column < vocab, tl.where(is_known, d, otherwise), 0.0)
            d = round_to(d, logits_ptr.dtype.element_ty, INTERPRETED)
            tl.store(row_ptr + column, d, mask=mask)


def linear_cross_entropy_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    chunk_tokens: int, needs_hidden: bool, needs_weight: bool, config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The loss, d hidden in its dtype and d weight in fp32.

    See `model1.ops.cross_entropy`; a gradient that is not needed is an empty tensor.
    """
    n, vocab, device = len(hidden), len(weight), hidden.device
    targets, matrix = targets.contiguous(), _padded(weight, hidden.dtype)
    losses = torch.empty(n, dtype=torch.float32, device=device)
    d_hidden = torch.empty(
        hidden.shape if needs_hidden else (0,), dtype=hidden.dtype, device=device
    )
    shape = matrix.shape if needs_weight else (0,)
    d_weight = torch.empty(shape, dtype=torch.float32, device=device)
    chunk = torch.empty(min(n, chunk_tokens), len(matrix), dtype=hidden.dtype, device=device)
    for first in range(0, n, chunk_tokens):
        rows = slice(first, first + chunk_tokens)
        part = hidden[rows]
        logits = torch.mm(part, matrix.T, out=chunk[: len(part)])
        _launch(logits, targets[rows], losses[rows], vocab, needs_hidden or needs_weight, config)
        if needs_hidden:
            torch.mm(logits, matrix, out=d_hidden[rows])
        if needs_weight:
            _accumulate(d_weight, logits.T, part, is_first=first == 0)
    if n == 0:
        d_weight.zero_()
    return losses.sum(), d_hidden, d_weight[:vocab]


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight in dtype with zero rows up to a multiple of COLUMN_STEP; itself where it is that."""
    missing = -len(weight) % COLUMN_STEP
    if missing == 0:
        return weight.to(dtype)
    matrix = torch.empty(len(weight) + missing, weight.shape[1], dtype=dtype, device=weight.device)
    matrix[: len(weight)] = weight
    matrix[len(weight) :] = 0
    return matrix


def _launch(
    logits: Tensor, targets: Tensor, losses: Tensor, vocab: int, has_gradient: bool,
    config: Config | None,
) -> None:  # fmt: skip
    kernel: Any = _linear_cross_entropy_kernel
    with torch.cuda.device_of(logits):
        kernel[(len(logits),)](
            logits, logits.stride(0), targets, losses, vocab,
            IGNORED=IGNORE, HAS_GRADIENT=has_gradient, INTERPRETED=knobs.runtime.interpret,
            **(config or Config()).options(logits.stride(0)),
        )  # fmt: skip


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total (fp32) += a @ b, summed in fp32; the first one overwrites."""
    beta = 0 if is_first else 1
    if a.dtype == torch.float32 or not a.is_cuda:  # only a GPU adds narrow products to fp32
        torch.addmm(total, a.float(), b.float(), beta=beta, out=total)
    else:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, beta=beta, out=total)


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Rows of 50257 logits, which are 50304 apart, and of a tokenizer of 1000."""
    cases = []
    for vocab, num_columns in ((50257, 50304), (1000, 1024)):
        for has_gradient in (False, True):
            options = Config().options(num_columns)
            num_warps, num_stages = options.pop("num_warps"), options.pop("num_stages")
            constants = {
                "stride_logits": num_columns, "IGNORED": IGNORE, "HAS_GRADIENT": has_gradient,
                "INTERPRETED": False, **options,
            }  # fmt: skip
            pointers = {"logits_ptr": "*bf16", "targets_ptr": "*i64", "losses_ptr": "*fp32"}
            cases.append(
                CompileCase(
                    name=f"{'gradient' if has_gradient else 'loss'} of {vocab}",
                    kernel=_linear_cross_entropy_kernel,
                    signature=pointers | {"vocab": "i32"} | dict.fromkeys(constants, "constexpr"),
                    constexprs=constants,
                    num_warps=num_warps,
                    num_stages=num_stages,
                )
            )
    return cases
