"""The cache operators as PyTorch sees them: one opaque node per call, whatever the backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly
from model1.ops.kv_cache.layout import KVLayout


def _operator(name: str, triton_module: str) -> Operator:
    implementations = {"ref": f"model1.ops.kv_cache.ref:{name}_ref"}
    return Operator(
        name=name,
        implementations=implementations | {"triton": f"model1.ops.{triton_module}:{name}_triton"},
    )


QUANTIZE_AND_STORE = _operator("quantize_and_store", "kv_write.portable")
GATHER_AND_DEQUANTIZE = _operator("gather_and_dequantize", "kv_cache.portable")
GATHER_ROPE = _operator("gather_rope", "kv_cache.portable")


def store(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor, layout: KVLayout, block_size: int,
    backend: str,
) -> None:  # fmt: skip
    """`quantize_and_store` on checked arguments."""
    name = QUANTIZE_AND_STORE.resolve(backend, kv.device)
    if calls_ref_directly(name):
        run = QUANTIZE_AND_STORE.load(name)
        run(kv, kv_cache, slot_mapping, layout=layout, block_size=block_size)
        return
    torch.ops.model1.quantize_and_store(
        kv.detach(), kv_cache, slot_mapping,
        layout.name, layout.d_nope, layout.d_rope, block_size, name,
    )  # fmt: skip


def gather(
    operator: Operator, kv_cache: Tensor, slots: Tensor, layout: KVLayout, block_size: int,
    dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    """`gather_and_dequantize` or `gather_rope` on checked arguments."""
    name = operator.resolve(backend, kv_cache.device)
    if calls_ref_directly(name):
        run = operator.load(name)
        return run(kv_cache, slots, layout=layout, block_size=block_size, dtype=dtype)
    return torch.ops.model1.gather_and_dequantize(
        kv_cache, slots, layout.name, layout.d_nope, layout.d_rope, block_size,
        operator is GATHER_ROPE, dtype, name,
    )  # fmt: skip


@torch.library.custom_op("model1::quantize_and_store", mutates_args=("kv_cache",))
def _quantize_and_store(
    kv: Tensor, kv_cache: Tensor, slot_mapping: Tensor,
    layout: str, d_nope: int, d_rope: int, block_size: int, backend: str,
) -> None:  # fmt: skip
    QUANTIZE_AND_STORE.load(backend)(
        kv, kv_cache, slot_mapping,
        layout=KVLayout(layout, d_nope, d_rope), block_size=block_size,  # pyright: ignore
    )  # fmt: skip


@torch.library.custom_op("model1::gather_and_dequantize", mutates_args=())
def _gather_and_dequantize(
    kv_cache: Tensor, slots: Tensor, layout: str, d_nope: int, d_rope: int, block_size: int,
    rope_only: bool, dtype: torch.dtype, backend: str,
) -> Tensor:  # fmt: skip
    operator = GATHER_ROPE if rope_only else GATHER_AND_DEQUANTIZE
    return operator.load(backend)(
        kv_cache, slots,
        layout=KVLayout(layout, d_nope, d_rope), block_size=block_size, dtype=dtype,  # pyright: ignore
    )  # fmt: skip


@_quantize_and_store.register_fake
def _(*args: object) -> None:
    """Writes in place; there is nothing to describe."""


@_gather_and_dequantize.register_fake
def _(kv_cache: Tensor, slots: Tensor, layout: str, d_nope: int, d_rope: int, *args: Any) -> Tensor:
    width = d_rope if args[1] else d_nope + d_rope
    return kv_cache.new_empty(*slots.shape, width, dtype=args[2])
