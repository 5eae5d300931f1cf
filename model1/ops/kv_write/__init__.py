"""The write path of attention: one pass from a token's raw latent to its bytes in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from model1.ops.backend import Operator, calls_ref_directly
from model1.ops.kv_cache import KVLayout
from model1.ops.kv_write.checks import check_arguments
from model1.ops.rope import Rotation

NORM_ROPE_STORE = Operator(
    name="norm_rope_store",
    implementations={
        "ref": "model1.ops.kv_write.ref:norm_rope_store_ref",
        "triton": "model1.ops.kv_write.portable:norm_rope_store_triton",
    },
)


def norm_rope_store(
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
    return_latent: bool = True,
    is_checked: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Normalise and rotate latents and write them into the cache, in place.

    x = rms_norm(kv[:, :norm_width], norm_weight, eps), the other channels as they are;
    latent = x with its last d_rope channels rotated; cache[slot] = quantised latent

    Each step rounds to kv's dtype: the composition of `rms_norm`, `apply_rope` and
    `quantize_and_store`, up to the order of the norm's fp32 sum.

    kv: [t, d] bf16, fp16 or fp32, any strides. norm_weight: [norm_width] floating point, None
    means 1. norm_width: d (MODEL1 normalises the rotary channels too) or d_nope (V3.2 does not).
    rotation: cos, sin [t, d_rope] fp32. kv_cache, slot_mapping, layout, block_size: as in
    `quantize_and_store`; the rows of slot -1 are not written.
    Returns the latents [t, d] in kv's dtype, those of slot -1 included; with return_latent=False
    an empty [0, d], and nothing but the cache is written. t = 0 does nothing. A NaN or infinity
    spoils its token as far as the norm reaches; a tile that holds one reads back as NaN.
    is_checked: the caller vouches for the arguments, which are not looked at then.
    Not differentiable. Raises ValueError for shapes, dtypes, devices and, on the CPU, slots
    outside the cache, which elsewhere count as -1; BackendUnavailable for a backend that cannot
    run here.
    Source: DeepSeek-V4 (arXiv 2606.19348) and DeepSeek-V3.2; docs/kv_layout.md for the bytes.
    """
    if not is_checked:
        check_arguments(
            kv, norm_weight, rotation, kv_cache, slot_mapping, layout, block_size, norm_width
        )
    name = NORM_ROPE_STORE.resolve(backend, kv.device)
    if calls_ref_directly(name):
        return NORM_ROPE_STORE.load(name)(
            kv, norm_weight, rotation, kv_cache, slot_mapping, layout=layout,
            block_size=block_size, eps=eps, norm_width=norm_width, return_latent=return_latent,
        )  # fmt: skip
    return torch.ops.model1.norm_rope_store(
        kv, norm_weight, rotation.cos, rotation.sin, kv_cache, slot_mapping,
        layout.name, layout.d_nope, layout.d_rope, block_size, eps, norm_width, return_latent,
        name,
    )  # fmt: skip


@torch.library.custom_op("model1::norm_rope_store", mutates_args=("kv_cache",))
def _norm_rope_store(
    kv: Tensor,
    norm_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    layout: str,
    d_nope: int,
    d_rope: int,
    block_size: int,
    eps: float,
    norm_width: int,
    return_latent: bool,
    backend: str,
) -> Tensor:
    with torch.no_grad():  # as in a direct call, so that both write the same bytes
        return NORM_ROPE_STORE.load(backend)(
            kv, norm_weight, Rotation(cos, sin), kv_cache, slot_mapping,
            layout=KVLayout(layout, d_nope, d_rope), block_size=block_size,  # pyright: ignore
            eps=eps, norm_width=norm_width, return_latent=return_latent,
        )  # fmt: skip


@_norm_rope_store.register_fake
def _(kv: Tensor, *args: object) -> Tensor:
    return_latent = args[-2]
    return kv.new_empty(kv.shape if return_latent else (0, kv.shape[1]))
