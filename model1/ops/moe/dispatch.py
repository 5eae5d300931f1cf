"""The expert operators as PyTorch sees them where a kernel or a plug-in runs.

The reference is not called through these: PyTorch differentiates and traces it by itself.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import Operator, triton_refusal

_REF, _PORTABLE = "model1.ops.moe.ref", "model1.ops.moe.portable"
ROUTE = Operator(
    name="moe_route",
    implementations={
        "ref": f"{_REF}:moe_route_ref",
        "triton": f"{_PORTABLE}_route:moe_route_triton",
    },
)
ROUTE_BACKWARD = Operator(
    name="moe_route_backward",
    implementations={
        "ref": f"{_REF}:moe_route_backward_ref",
        "triton": f"{_PORTABLE}_route:moe_route_backward_triton",
    },
)
EXPERTS = Operator(
    name="moe_experts",
    implementations={
        "ref": f"{_REF}:moe_experts_ref",
        "triton": f"{_PORTABLE}:moe_experts_triton",
        "grouped_mm": f"{_PORTABLE}:moe_experts_grouped_mm",
    },
)
EXPERTS_BACKWARD = Operator(
    name="moe_experts_backward",
    implementations={
        "ref": f"{_REF}:moe_experts_backward_ref",
        "triton": f"{_PORTABLE}:moe_experts_backward_triton",
        "grouped_mm": f"{_PORTABLE}:moe_experts_backward_grouped_mm",
    },
)

EXPERTS_FP8 = Operator(
    name="moe_experts_fp8",
    implementations={
        "ref": f"{_REF}:moe_experts_fp8_ref",
        "triton": f"{_PORTABLE}_fp8:moe_experts_fp8_triton",
    },
    triton_min_capability=(8, 9),
)


def choose_experts_backend(
    backend: str, device: torch.device, dtype: torch.dtype, num_experts: int,
    widths: tuple[int, ...],
) -> str:  # fmt: skip
    """The concrete backend of `moe_experts`; "auto" takes grouped_mm where it runs."""
    if backend not in ("auto", "grouped_mm"):
        return EXPERTS.resolve(backend, device)
    refusal = grouped_mm_refusal(device)
    fits = dtype == torch.bfloat16 and not any(n % 8 for n in widths) and num_experts < 1024
    if backend == "auto":
        return "grouped_mm" if refusal is None and fits else EXPERTS.resolve(backend, device)
    if refusal is not None:
        raise BackendUnavailable(f"moe_experts/grouped_mm {refusal}")
    if not fits:
        rule = "grouped_mm needs bfloat16, c and m multiples of 8 and fewer than 1024 experts"
        raise ValueError(f"{rule}, got {dtype}, {widths}, {num_experts}")
    return backend


# chosen while a graph is traced and no part of it, as Operator.resolve
vars(choose_experts_backend)["_dynamo_marked_constant"] = True


@functools.cache
def grouped_mm_refusal(device: torch.device) -> str | None:
    """Why PyTorch's grouped product is not used here, None where it is.

    Its CUTLASS kernel for sm_90 is meant; elsewhere it is a loop over groups, or was seen to leave
    gradients of experts without tokens unwritten.
    """
    if (refusal := triton_refusal(device, (9, 0))) is not None:
        return refusal
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an sm_90 GPU, device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs sm_90, device is sm_{capability[0]}{capability[1]}"
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    return None


@torch.library.custom_op("model1::moe_route", mutates_args=())
def _route(
    logits: Tensor, balance_bias: Tensor, topk: int, scaling: float, backend: str
) -> tuple[Tensor, Tensor]:
    return ROUTE.load(backend)(logits, balance_bias, topk=topk, scaling=scaling)


@torch.library.custom_op("model1::moe_route_backward", mutates_args=())
def _route_backward(
    grad: Tensor, weights: Tensor, expert_ids: Tensor, logits: Tensor, scaling: float, backend: str
) -> Tensor:
    run = ROUTE_BACKWARD.load(backend)
    return run(grad, weights, expert_ids, logits, scaling=scaling)


@torch.library.custom_op("model1::moe_experts", mutates_args=())
def _experts(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    swiglu_limit: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # all but the first are for the gradient of our own kernels; others return one tensor
    run = EXPERTS.load(backend)
    results = run(x, weights, expert_ids, gate_up, down, swiglu_limit=swiglu_limit)
    if not isinstance(results, Tensor):
        return results
    positions, ends = (x.new_empty(0, dtype=torch.int32) for _ in range(2))
    return results, x.new_empty(0), positions, ends, x.new_empty(0, dtype=torch.float32)


@torch.library.custom_op("model1::moe_experts_backward", mutates_args=())
def _experts_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    h: Tensor,
    positions: Tensor,
    ends: Tensor,
    row_weight: Tensor,
    swiglu_limit: float | None,
    needs_gate_up: bool,
    needs_down: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run, grad = EXPERTS_BACKWARD.load(backend), grad.contiguous()
    if backend not in ("triton", "grouped_mm"):
        return run(grad, x, weights, expert_ids, gate_up, down, swiglu_limit=swiglu_limit)
    saved = (x, weights, gate_up, down, h, positions, ends, row_weight)
    needs = (True, True, needs_gate_up, needs_down)
    return run(grad, *saved, swiglu_limit=swiglu_limit, needs=needs)


@torch.library.custom_op("model1::moe_experts_fp8", mutates_args=())
def _experts_fp8(
    x: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    swiglu_limit: float | None,
    backend: str,
) -> Tensor:
    tensors = (x, weights, expert_ids, gate_up, gate_up_scale, down, down_scale)
    return EXPERTS_FP8.load(backend)(*tensors, swiglu_limit=swiglu_limit)


@_experts_fp8.register_fake
def _(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(x.shape)


@_route.register_fake
def _(logits: Tensor, balance_bias: Tensor, topk: int, *args: object) -> tuple[Tensor, Tensor]:
    shape = logits.shape[0], topk
    ids = logits.new_empty(shape, dtype=torch.int64)
    return logits.new_empty(shape, dtype=torch.float32), ids


@_route_backward.register_fake
def _(grad: Tensor, weights: Tensor, expert_ids: Tensor, logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, *args: Any) -> Any:
    size, e = expert_ids.numel(), gate_up.shape[0]
    shapes = (size, gate_up.shape[1]), expert_ids.shape, (e,), (size,)
    if args[-1] not in ("triton", "grouped_mm"):
        shapes = ((0,),) * 4
    return (
        x.new_empty(x.shape),
        x.new_empty(shapes[0]),
        x.new_empty(shapes[1], dtype=torch.int32),
        x.new_empty(shapes[2], dtype=torch.int32),
        x.new_empty(shapes[3], dtype=torch.float32),
    )


@_experts_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    has_all = args[-1] not in ("triton", "grouped_mm")
    needs_gate_up, needs_down = (has_all or needed for needed in args[5:7])
    return (
        x.new_empty(x.shape),
        weights.new_empty(weights.shape),
        gate_up.new_empty(gate_up.shape if needs_gate_up else (0,)),
        down.new_empty(down.shape if needs_down else (0,)),
    )


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, _, ctx.scaling, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, logits)


def _back_through_route(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    run = torch.ops.model1.moe_route_backward
    return run(grad, *ctx.saved_tensors, ctx.scaling, ctx.backend), None, None, None, None


def _save_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.limit, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])


def _back_through_experts(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    run = torch.ops.model1.moe_experts_backward
    d_x, d_weights, d_gate_up, d_down = run(
        grad, *ctx.saved_tensors, ctx.limit, needs[3], needs[4], ctx.backend
    )
    d_gate_up, d_down = d_gate_up if needs[3] else None, d_down if needs[4] else None
    return d_x, d_weights, None, d_gate_up, d_down, None, None


_route.register_autograd(_back_through_route, setup_context=_save_route)
_experts.register_autograd(_back_through_experts, setup_context=_save_experts)
