"""How the Triton kernels cut their work, by GPU and problem: the only place with such numbers."""

from __future__ import annotations

from dataclasses import dataclass

from model1.ops.compile_cases import KernelTarget


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Launch parameters of one kernel.

    block_h heads and block_n keys per step, channels held in pieces of `piece`. split_scores: the
    two warp groups of a Hopper program share the score product (see `portable`).
    """

    block_h: int
    block_n: int
    piece: int
    num_warps: int
    num_stages: int
    split_scores: bool = False


# All are compiled without register spills; those of sm_90 for more than 16 heads are measured on an
# H200, 2026-11-22 (docs/log.md).
def forward_config(target: KernelTarget, num_heads: int, d: int, item_bytes: int) -> Config:
    """For `_sparse_attn_fwd_kernel`."""
    if item_bytes > 2:
        warps = 4 if target.kind == "hip" else 8
        return Config(block_h=16, block_n=16, piece=64, num_warps=warps, num_stages=1)
    if target.kind == "hip":
        return Config(block_h=16, block_n=32, piece=128, num_warps=4, num_stages=1)
    if d > 576:  # beyond the models' rows: small tiles, which fit into shared memory
        return Config(block_h=16, block_n=16, piece=128, num_warps=8, num_stages=2)
    if num_heads <= 16:
        return Config(block_h=16, block_n=64, piece=128, num_warps=4, num_stages=2)
    if target.arch == 90:
        piece = 128 if d <= 512 else 512
        return Config(
            block_h=64, block_n=64, piece=piece, num_warps=8, num_stages=2, split_scores=True
        )
    return Config(block_h=32, block_n=32, piece=128, num_warps=8, num_stages=2)


def backward_config(
    target: KernelTarget, num_heads: int, d: int, item_bytes: int, deterministic: bool
) -> Config:
    """For `_sparse_attn_bwd_kernel`."""
    if item_bytes > 2:
        return Config(block_h=16, block_n=16, piece=64, num_warps=8, num_stages=1)
    if target.kind == "hip":
        return Config(block_h=16, block_n=16, piece=128, num_warps=4, num_stages=1)
    if target.arch == 90 and num_heads > 16 and d <= 512:
        return Config(block_h=64, block_n=64, piece=64, num_warps=8, num_stages=1)
    if target.arch == 90 and num_heads > 16 and d <= 576 and not deterministic:
        return Config(block_h=32, block_n=64, piece=128, num_warps=8, num_stages=1)
    if target.arch in (80, 90) and num_heads > 16 and d <= 576:
        block_n = 16 if deterministic else 32
        return Config(block_h=32, block_n=block_n, piece=128, num_warps=8, num_stages=2)
    num_warps = 8 if target.arch == 80 else 4
    return Config(block_h=16, block_n=16, piece=128, num_warps=num_warps, num_stages=2)
