"""Plain PyTorch write path: norm, rotation and store as three separate steps."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.kv_cache.layout import KVLayout
from model1.ops.kv_cache.ref import quantize_and_store_ref
from model1.ops.norm.ref import normalise
from model1.ops.rope.angles import Rotation
from model1.ops.rope.ref import rotate_tail_ref


def norm_rope_store_ref(
    kv: Tensor,
    norm_weight: Tensor | None,
    rotation: Rotation,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    layout: KVLayout,
    block_size: int,
    eps: float,
    norm_width: int,
    return_latent: bool,
) -> Tensor:
    """See `model1.ops.kv_write.norm_rope_store`."""
    latent = normalise(kv[:, :norm_width], norm_weight, eps)
    if norm_width < layout.d:
        latent = torch.cat([latent, kv[:, norm_width:]], dim=-1)
    latent = rotate_tail_ref(latent, rotation)
    quantize_and_store_ref(latent, kv_cache, slot_mapping, layout=layout, block_size=block_size)
    return latent if return_latent else latent.new_empty(0, layout.d)
