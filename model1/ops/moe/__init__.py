"""Mixture of experts: bias-balanced routing and the routed feed-forwards. Dropless.

Everything is deterministic, forward and backward: kernels use no atomics and add in a fixed order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.moe.checks import (
    KERNEL_DTYPES,
    MAX_EXPERTS,
    check_experts,
    check_kernel_experts,
    check_kernel_route,
    check_route,
)
from model1.ops.moe.dispatch import ROUTE, choose_experts_backend
from model1.ops.moe.ref import moe_experts_ref, moe_route_ref


def moe_route(
    logits: Tensor, balance_bias: Tensor, *, topk: int, scaling: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Choose topk experts of each token.

    g = sqrt(softplus(logits)); the choice is the topk of g + balance_bias, the best first and of
    equal ones the lower expert; the weights are the chosen g without the bias, normalised to sum 1,
    times `scaling`. logits: [t, e]; balance_bias: [e], no gradient. Returns weights [t, topk] fp32
    and expert_ids [t, topk] int64. A NaN is above all others and spoils its token's weights alone.

    Differentiable in logits, by kernels once. A token's bits depend on its own logits alone. Any
    number of tokens and, for kernels, up to 4096 experts. Raises ValueError for shapes, dtypes and
    devices that do not fit, BackendUnavailable for a backend that cannot run here; "auto" is
    triton on a GPU for bf16, fp16 and fp32, else the reference.
    Source: DeepSeek-V4 (arXiv 2606.19348); bias balancing: arXiv 2408.15664.
    """
    check_route(logits, balance_bias, topk)
    name = ROUTE.resolve(_usable(backend, logits, logits.shape[-1]), logits.device)
    if name == "ref":
        return moe_route_ref(logits, balance_bias, topk=topk, scaling=scaling)
    check_kernel_route(logits, balance_bias, name)
    return torch.ops.model1.moe_route(logits, balance_bias, topk, scaling, name)


def moe_experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    swiglu_limit: float | None,
    backend: str = "auto",
) -> Tensor:
    """sum over the chosen experts of weight * down_e swiglu(gate_up_e x), [t, c].

    x: [t, c]; weights, expert_ids: [t, topk] of `moe_route`; gate_up: [e, 2*m, c], gate rows first;
    down: [e, c, m]; both are rounded to the dtype of x. An id outside 0..e-1 contributes nothing.
    Experts that nobody chose are not read; their gradients are zero. The number of tokens per
    expert is not limited and never leaves the device.

    Differentiable in all but the ids, by kernels once, with the same bits every time. Kernels add
    in fp32 and multiply the weight before `down`; a token's bits depend on its own row, weights and
    ids, in their order, not on other tokens: promised of triton, and of grouped_mm as far as
    PyTorch's product keeps it, for equal numbers of tokens. Gradients of the weights depend on the
    order of tokens.

    Backends: ref; triton; grouped_mm, which is triton around PyTorch's own grouped products (sm_90,
    bf16, c and m multiples of 8) and what "auto" means there. Errors as in `moe_route`.
    """
    check_experts(x, weights, expert_ids, gate_up, down)
    widths = gate_up.shape[2], down.shape[2]
    name = choose_experts_backend(
        _usable(backend, x, gate_up.shape[0]), x.device, x.dtype, gate_up.shape[0], widths
    )
    if name == "ref":
        return moe_experts_ref(x, weights, expert_ids, gate_up, down, swiglu_limit=swiglu_limit)
    check_kernel_experts(x, weights, expert_ids, gate_up, down, name)
    arguments = gate_up.to(x.dtype).contiguous(), down.to(x.dtype).contiguous(), swiglu_limit, name
    return torch.ops.model1.moe_experts(x, weights, expert_ids, *arguments)[0]


def _usable(backend: str, x: Tensor, num_experts: int) -> str:
    """`backend`, or "ref" for "auto" where a GPU's kernels do not take such tokens."""
    if backend != "auto" or not x.is_cuda:
        return backend
    return backend if x.dtype in KERNEL_DTYPES and num_experts <= MAX_EXPERTS else "ref"
