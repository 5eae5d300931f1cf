"""Arguments that every kernel of the low-rank scan shares, from a call's tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import device_target, num_sms
from model1.ops.selector.portable_sizes import Config, Cut, ScanShape, choose_config, choose_cut

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True)
class Scan:
    """Queries over the low-rank vectors and rotary keys of paged requests."""

    scan_q: Tensor
    index_cache: Tensor
    kv_cache: Tensor
    block_table: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    key_end: Tensor
    max_seqlen: int
    layout: KVLayout
    block_size: int

    @property
    def shape(self) -> ScanShape:
        """What kernels are compiled for."""
        return ScanShape(
            h=self.scan_q.shape[1], r=self.index_cache.shape[1], layout=self.layout,
            block_size=self.block_size, dtype=self.scan_q.dtype,
        )  # fmt: skip

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to launch."""
        return 0 in (len(self.scan_q), len(self.block_table), self.max_seqlen)

    def cut(
        self, config: Config | None, row_bytes: int, split_bytes: int, *, deterministic: bool
    ) -> tuple[Config, Cut]:
        """The sizes for this device, unless given, and the programs."""
        device = self.scan_q.device
        is_single = deterministic or self.max_seqlen_q == 1
        config = config or choose_config(device_target(device), self.shape, is_single=is_single)
        return config, choose_cut(
            config, self.shape, t=len(self.scan_q), b=len(self.block_table),
            max_seqlen_q=self.max_seqlen_q, max_seqlen=self.max_seqlen, row_bytes=row_bytes,
            split_bytes=split_bytes, num_sms=num_sms(device), deterministic=deterministic,
        )  # fmt: skip

    def arguments(self, config: Config, cut: Cut, rows: tuple[int, int]) -> dict[str, Any]:
        """What both kernels take for a chunk of rows."""
        rope = rope_view(self.kv_cache, self.layout, self.block_size)
        return {
            "q_ptr": self.scan_q, "z_ptr": self.index_cache, "rope_ptr": rope,
            "table_ptr": self.block_table, "cu_seqlens_q_ptr": self.cu_seqlens_q,
            "key_end_ptr": self.key_end, "row_first": rows[0], "row_end": rows[1],
            "max_seqlen": self.max_seqlen, "row_tiles": cut.row_tiles,
            "num_splits": cut.num_splits, "stride_qt": self.scan_q.stride(0),
            "stride_qh": self.scan_q.stride(1), "stride_z": self.index_cache.stride(0),
            "stride_rope": rope.stride(0), "stride_table": self.block_table.stride(0),
            **scan_constants(self.shape, config),
        }  # fmt: skip

    def num_programs(self, cut: Cut) -> int:
        """Programs of a chunk whose tiles hold all heads."""
        return len(self.block_table) * cut.row_tiles * cut.num_splits


def scan_constants(shape: ScanShape, config: Config) -> dict[str, Any]:
    """The compile-time constants that both kernels take, and how they are launched."""
    item_bytes = 4 if shape.layout.name == "fp32" else 2
    return {
        "H": shape.h,
        "R": shape.r,
        "PIECES": shape.pieces,
        "BLOCK_SIZE": shape.block_size,
        "STRIDE_ROPE_ROW": shape.layout.row_bytes // item_bytes,
        "COMPUTE": _TYPES[shape.dtype],
        "QUERIES": shape.queries(config),
        "BLOCK_H": shape.block_h,
        "BLOCK_N": config.block_n,
    }


def rope_view(kv_cache: Tensor, layout: KVLayout, block_size: int) -> Tensor:
    """The cache as numbers of the rotary channels' type, from those of the first token on."""
    dtype = torch.float32 if layout.name == "fp32" else torch.bfloat16
    start = layout.rope_start_bytes if layout.d_rope else 0
    return kv_cache[:, start : layout.block_bytes(block_size)].view(dtype)


_POINTERS = {
    "q_ptr": "*bf16", "z_ptr": "*bf16", "rope_ptr": "*bf16", "table_ptr": "*i32",
    "cu_seqlens_q_ptr": "*i32", "key_end_ptr": "*i32", "core_ptr": "*u8", "out_ptr": "*fp32",
    "lse_ptr": "*fp32", "partial_ptr": "*fp32", "votes_ptr": "*fp32", "weights_ptr": "*u16",
    "largest_ptr": "*fp32", "state_ptr": "*i32",
}  # fmt: skip


def scan_case(
    name: str, kernel: Any, shape: ScanShape, config: Config, constants: dict[str, Any]
) -> CompileCase:
    """A kernel of the scan as it is launched for contiguous bf16 queries and caches."""
    width = shape.r + shape.layout.d_rope
    # The launcher compiles for strides that are multiples of 16, which a signature cannot say.
    strides = {
        "stride_qt": shape.h * width, "stride_qh": width, "stride_z": shape.r,
        "stride_rope": shape.layout.block_stride_bytes(shape.block_size) // 2,
    }  # fmt: skip
    constants = scan_constants(shape, config) | strides | constants
    signature = dict.fromkeys(kernel.arg_names, "i32") | _POINTERS
    return CompileCase(name, kernel, signature, constants, config.num_warps, config.num_stages)
