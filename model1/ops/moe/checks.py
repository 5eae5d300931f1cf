"""What the expert operators accept; the kernels trust it."""

from __future__ import annotations

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# A program holds a token's logits and looks for its tile among all experts; the key that orders
# scores has 16 bits for the expert.
MAX_EXPERTS = 4096


def check_route(logits: Tensor, balance_bias: Tensor, topk: int) -> None:
    """Raise ValueError for the first argument of `moe_route` that breaks the contract."""
    if not 0 < topk <= logits.shape[-1]:
        raise ValueError(f"topk must be in 1..{logits.shape[-1]}, got {topk}")
    if balance_bias.shape != logits.shape[-1:]:
        raise ValueError(
            f"balance_bias must be [{logits.shape[-1]}], got {list(balance_bias.shape)}"
        )


def check_experts(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor
) -> None:
    """The same for `moe_experts`."""
    if x.dim() != 2:
        raise ValueError(f"x must be [t, c], got {list(x.shape)}")
    if weights.shape != expert_ids.shape or weights.dim() != 2 or weights.shape[0] != x.shape[0]:
        raise ValueError(
            f"weights and expert_ids must be [{x.shape[0]}, topk], "
            f"got {list(weights.shape)}, {list(expert_ids.shape)}"
        )
    if gate_up.dim() != 3 or gate_up.shape[1] % 2 or gate_up.shape[2] != x.shape[1]:
        raise ValueError(f"gate_up must be [e, 2 * m, {x.shape[1]}], got {list(gate_up.shape)}")
    e, width, c = gate_up.shape
    if down.shape != (e, c, width // 2):
        raise ValueError(f"down must be [{e}, {c}, {width // 2}], got {list(down.shape)}")


def check_kernel_route(logits: Tensor, balance_bias: Tensor, backend: str) -> None:
    """The same for what operators ask of `moe_route` beyond that, and what kernels do."""
    if logits.dim() != 2:
        raise ValueError(f"logits must be [t, e], got {list(logits.shape)}")
    if backend == "triton" and logits.dtype not in KERNEL_DTYPES:
        raise ValueError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if backend == "triton" and logits.shape[1] > MAX_EXPERTS:
        raise ValueError(f"e must be at most {MAX_EXPERTS}, got {logits.shape[1]}")
    _check_device("balance_bias", balance_bias, logits, "logits")


def check_kernel_experts(
    x: Tensor, weights: Tensor, expert_ids: Tensor, gate_up: Tensor, down: Tensor, backend: str
) -> None:
    """The same for `moe_experts`."""
    if expert_ids.dtype != torch.int64:
        raise ValueError(f"expert_ids must be int64, got {expert_ids.dtype}")
    if backend in ("triton", "grouped_mm"):
        _check_sizes(x, weights, gate_up)
    for name, tensor in (
        ("weights", weights), ("expert_ids", expert_ids), ("gate_up", gate_up), ("down", down)
    ):  # fmt: skip
        _check_device(name, tensor, x, "x")


def _check_sizes(x: Tensor, weights: Tensor, gate_up: Tensor) -> None:
    if x.dtype not in KERNEL_DTYPES or 0 in (*x.shape[1:], gate_up.shape[1]):
        rule = "x must be [t, c], c and m > 0, in bfloat16, float16 or float32"
        raise ValueError(f"{rule}, got {list(x.shape)} {x.dtype}")
    if weights.dtype not in KERNEL_DTYPES or weights.shape[1] == 0:
        rule = f"weights must be [{x.shape[0]}, topk], topk > 0, floating point"
        raise ValueError(f"{rule}, got {list(weights.shape)} {weights.dtype}")
    if not 0 < gate_up.shape[0] <= MAX_EXPERTS:
        raise ValueError(f"e must be in 1..{MAX_EXPERTS}, got {gate_up.shape[0]}")


def _check_device(name: str, tensor: Tensor, x: Tensor, owner: str) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {owner}'s device {x.device}, got {tensor.device}")
