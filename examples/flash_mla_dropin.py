"""Call Model1's operators through the FlashMLA interface and compare with plain PyTorch.

python examples/flash_mla_dropin.py        on a GPU where there is one, else on the CPU
"""

from __future__ import annotations

import torch
from torch import Tensor

import model1.flash_mla as flash_mla
from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    quantize_and_store,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODEL1 = KVLayout("model1_fp8", d_nope=448, d_rope=64)  # 584 bytes per token
PAGE, NUM_PAGES, TOPK = 64, 8, 128
B, S_Q, H, D = 2, 2, 64, 512


def attention(q: Tensor, keys: Tensor) -> Tensor:
    """q [t, h, d] over keys [t, n, d], which are the values too."""
    weights = (q.float() @ keys.float().mT * D**-0.5).softmax(-1)
    return weights @ keys.float()


def decode() -> float:
    """Sparse decode over a paged FP8 cache; the largest error."""
    cache = allocate_kv_cache(NUM_PAGES, PAGE, MODEL1, DEVICE)
    tokens = torch.randn(NUM_PAGES * PAGE, D, device=DEVICE) / 4
    slots = torch.randperm(NUM_PAGES * PAGE, device=DEVICE)
    quantize_and_store(tokens, cache, slots, layout=MODEL1, block_size=PAGE)
    # the shape that FlashMLA's users know: [pages, tokens, one head, bytes]
    shape, stride = (NUM_PAGES, PAGE, 1, 584), (cache.stride(0), 584, 584, 1)
    k_cache = cache.as_strided(shape, stride).view(torch.float8_e4m3fn)
    q = torch.randn(B, S_Q, H, D, device=DEVICE, dtype=torch.bfloat16)
    indices = slots[: B * S_Q * TOPK].view(B, S_Q, TOPK).int()

    metadata, num_splits = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, k_cache, None, None, 512, metadata, num_splits, is_fp8_kvcache=True, indices=indices
    )

    print(f"decode: out {list(out.shape)} {out.dtype}, lse {list(lse.shape)} {lse.dtype}")
    keys = gather_and_dequantize(cache, indices.flatten(0, 1), layout=MODEL1, block_size=PAGE)
    return (out.flatten(0, 1) - attention(q.flatten(0, 1), keys)).abs().max().item()


def prefill() -> float:
    """Sparse attention over one unpaged sequence; the largest error."""
    q = torch.randn(100, H, D, device=DEVICE, dtype=torch.bfloat16)
    kv = torch.randn(300, 1, D, device=DEVICE, dtype=torch.bfloat16) / 4
    indices = torch.randint(300, (100, 1, TOPK), device=DEVICE, dtype=torch.int32)

    out, _, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, sm_scale=D**-0.5)

    print(f"prefill: out {list(out.shape)}, max_logits and lse {list(lse.shape)}")
    keys = kv[indices[:, 0].long(), 0]
    return (out - attention(q, keys)).abs().max().item()


def main() -> None:
    """Both calls, on the device that is there."""
    print(f"on {DEVICE}")
    errors = decode(), prefill()
    print(f"largest error: decode {errors[0]:.1e}, prefill {errors[1]:.1e}")
    if max(errors) > 1e-2:
        raise SystemExit("that is too much")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
