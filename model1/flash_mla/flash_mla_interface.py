"""The module in which FlashMLA defines what it exports, for code that imports from there.

FlashMLA keeps `FlashMLASchedMeta` in it and not in its package.
"""

from model1.flash_mla.decode import flash_mla_with_kvcache
from model1.flash_mla.metadata import FlashMLASchedMeta, get_mla_metadata
from model1.flash_mla.prefill import flash_mla_sparse_fwd
from model1.flash_mla.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]
