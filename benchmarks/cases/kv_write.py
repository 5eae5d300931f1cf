"""The write path of attention, whose target is 80 % of the copy bandwidth for many tokens."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Work, own_work
from benchmarks.kernel_inputs import MODEL1, V32, normal
from model1.ops.kv_cache import KVLayout, allocate_kv_cache
from model1.ops.kv_write import norm_rope_store
from model1.ops.rope import Rotation

OPERATOR = "kv_write"
TESTS = ("tests/ops/test_kv_write*.py",)
BLOCK_SIZE = 64
# Together the copies of the inputs are larger than any cache, so that no call finds its own there.
_COPIED_BYTES = 256 << 20


def store_work(
    t: int, layout: KVLayout, device: torch.device, *, copied_bytes: int = _COPIED_BYTES
) -> Work:
    """Normalise, rotate, quantise and store t tokens, in blocks that lie anywhere in the cache.

    Bytes are those of latents, angles and slots, read, and of the cache rows, written.
    """
    torch.manual_seed(1)
    token_bytes = 2 * layout.d + layout.bytes_per_token + 2 * 4 * layout.d_rope + 8
    width = layout.d if layout.name == "model1_fp8" else layout.d_nope
    weight = torch.ones(width, device=device)
    num_blocks = -(-t // BLOCK_SIZE)
    cache = allocate_kv_cache(num_blocks, BLOCK_SIZE, layout, device)
    blocks = torch.randperm(num_blocks, device=device).repeat_interleave(BLOCK_SIZE)[:t]
    slots = blocks * BLOCK_SIZE + torch.arange(t, device=device) % BLOCK_SIZE
    copies = [
        (
            normal(t, layout.d, dtype=torch.bfloat16, device=device),
            Rotation(*torch.randn(2, t, layout.d_rope, device=device)),
            cache.clone(),
        )
        for _ in range(max(1, copied_bytes // (t * token_bytes)))
    ]
    turns = itertools.cycle(copies)

    def call() -> tuple[Tensor, ...]:
        kv, rotation, target = next(turns)
        norm_rope_store(
            kv, weight, rotation, target, slots, layout=layout, block_size=BLOCK_SIZE,
            eps=1e-6, norm_width=width, return_latent=False,
        )  # fmt: skip
        return (target,)

    return own_work(call, 0.0, t * token_bytes)


def cases() -> Iterator[Case]:
    """Prefill-sized writes; with `--graph` one copy of the inputs is replayed and may stay warm."""
    for layout in (MODEL1, V32):
        for t in (8192, 16384, 32768, 65536):
            build = functools.partial(store_work, t, layout)
            yield Case(OPERATOR, f"{layout.name} t={t}", build)
