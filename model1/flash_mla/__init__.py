"""The public FlashMLA calls on Model1's operators: `import model1.flash_mla as flash_mla`.

Signatures, defaults, results and error classes are those of FlashMLA
(<https://github.com/deepseek-ai/FlashMLA>): `AssertionError` for what it asserts, `RuntimeError`
for tensors that it refuses. Beyond it: any number of heads, page size and top-k, other splits of
the latent, FP8 caches in dense and bf16 caches in sparse decode, any device. Nothing is computed
ahead of a call, so lengths may change between calls with one holder, also in a CUDA graph. All of
them trace into one graph of `torch.compile`, a holder of the graph's own or from outside included;
what they refuse is there raised by the compiler, with the same words.
"""

from model1.flash_mla.flash_mla_interface import FlashMLASchedMeta as FlashMLASchedMeta
from model1.flash_mla.flash_mla_interface import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)

__version__ = "1.0.0"  # of the FlashMLA whose interface this is

# FlashMLA's own list, which leaves the holder's class out.
__all__ = [
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
