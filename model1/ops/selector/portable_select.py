# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The choice of the largest scores of every row in Triton: radix selection, many programs a row.

When the first digits of all scores are counted, one launch lists the scores with the threshold's
digit, and one finds the threshold among these and writes the chosen columns in ascending order.
Among equal scores the lower columns win. `torch.topk` has one or few blocks for a row and orders
ties by an algorithm that depends on the number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import device_target, launch_options
from model1.ops.selector.portable_digits import (
    STATE,
    await_launch,
    count_first,
    find_first,
    find_threshold,
    first_digit,
    list_chunk,
    num_chosen,
    ordered,
)

_FILL = tl.constexpr(1024)
_SIZES = ["stride_scores", "max_seqlen", "topk", "num_chunks"]
_FEW_ROWS = 8  # have to fill the GPU
_COLUMNS, _MANY_ROWS_COLUMNS, _WARPS = 512, 4096, 8  # of a chunk


@triton.jit
def _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS: tl.constexpr):
    """Columns of a chunk, whether the row sees them, and their scores."""
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    is_key = column < num_keys
    at = scores_ptr + row.to(tl.int64) * stride_scores + column
    return column, is_key, tl.load(at, mask=is_key, other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def _count_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr, stride_scores, max_seqlen, topk, num_chunks,
    OVERLAPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Counts the first digits of a chunk; state: [rows, STATE] int32, zeros at first."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, _ = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    await_launch(OVERLAPS)
    if chunk * COLUMNS >= num_keys:
        return
    _, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    count_first(state_ptr + row.to(tl.int64) * STATE, score, is_key)


@triton.jit(do_not_specialize=_SIZES)
def _list_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr,
    listed_ptr,  # [rows, 2, stride_scores] int32: scores with the threshold's first digit, columns
    chunk_counts_ptr,  # [rows, num_chunks] int32: scores with a higher one
    stride_scores, max_seqlen, topk, num_chunks, OVERLAPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sorts a chunk's scores by the threshold's first digit."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    await_launch(OVERLAPS)
    if (chunk * COLUMNS >= num_keys) | (wanted <= 0):
        return
    column, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    state_ptr += row.to(tl.int64) * STATE
    listed_ptr += 2 * row.to(tl.int64) * stride_scores
    found, _ = find_first(state_ptr, wanted)
    score = ordered(score)
    digit = first_digit(score)
    above = tl.sum((is_key & (digit > found)).to(tl.int32), 0)
    tl.store(chunk_counts_ptr + tl.program_id(0), above)
    list_chunk(state_ptr, listed_ptr, stride_scores, score, column, is_key & (digit == found))


@triton.jit(do_not_specialize=[*_SIZES, "stride_out"])
def _write_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr, listed_ptr, chunk_counts_ptr, out_ptr,
    stride_scores, max_seqlen, topk, num_chunks, stride_out,
    OVERLAPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A chunk's chosen columns to their places in out [rows, stride_out] int32; -1 behind all."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    out_ptr += row.to(tl.int64) * stride_out
    await_launch(OVERLAPS)
    for start in range(chunk * _FILL, topk, num_chunks * _FILL):
        place = start + tl.arange(0, _FILL)
        tl.store(out_ptr + place, -1, mask=(place >= wanted) & (place < topk))
    if (chunk * COLUMNS >= num_keys) | (wanted <= 0):
        return
    column, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    other = tl.arange(0, BLOCK_CHUNKS)
    at = chunk_counts_ptr + row.to(tl.int64) * num_chunks + other
    place = tl.sum(tl.load(at, mask=other < chunk, other=0), 0)
    state_ptr += row.to(tl.int64) * STATE
    listed_ptr += 2 * row.to(tl.int64) * stride_scores
    found, above = find_first(state_ptr, wanted)
    threshold, spare, above_before, equal_before = find_threshold(
        state_ptr, listed_ptr, stride_scores, found, wanted - above, chunk * COLUMNS
    )
    score = ordered(score)
    is_equal = (is_key & (score == threshold)).to(tl.int32)
    equal_rank = equal_before + tl.cumsum(is_equal, 0) - is_equal
    is_chosen = (is_key & (score > threshold)) | ((is_equal != 0) & (equal_rank < spare))
    place += above_before + tl.minimum(equal_before, spare)
    place += tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + place, column, mask=is_chosen & (place < topk))


def select_bytes(max_seqlen: int) -> int:
    """Scratch memory that the choice takes for a row, its scores included."""
    return 4 * (3 * _width(max_seqlen) + STATE.value + -(-max_seqlen // _COLUMNS))


def _width(max_seqlen: int) -> int:
    """Scores from one row to the next: a multiple of 16 bytes."""
    return -(-max_seqlen // 4) * 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The scores of a chunk of rows, and what choosing the largest of them takes.

    Whoever writes the scores clears the state before, for every chunk of rows.
    """

    scores: Tensor  # [rows, width] fp32
    state: Tensor  # [rows, STATE] int32
    listed: Tensor  # [rows, 2, width] int32

    @classmethod
    def empty(cls, rows: int, max_seqlen: int, device: torch.device) -> Choice:
        """Memory for so many rows and columns."""
        width = _width(max_seqlen)
        return cls(
            torch.empty(rows, width, dtype=torch.float32, device=device),
            torch.empty(rows, STATE.value, dtype=torch.int32, device=device),
            torch.empty(rows, 2, width, dtype=torch.int32, device=device),
        )

    @property
    def state_arguments(self) -> dict[str, Any]:
        """What a kernel takes to clear the state."""
        return {"state_ptr": self.state, "state_words": self.state.numel()}

    def store_largest(
        self, key_end: Tensor, count: Tensor | None, max_seqlen: int, topk_indices: Tensor, *,
        is_counted: bool = False,
    ) -> None:  # fmt: skip
        """Columns of the count[i] largest of the first key_end[i] scores, to topk_indices[i].

        topk_indices: [rows, topk] int32, ascending, -1 behind. count: [rows] int32, None = topk.
        is_counted: the first digits are. The launches may begin before the one of the scores ends.
        """
        rows, topk = topk_indices.shape
        device = key_end.device
        columns = _COLUMNS if rows < _FEW_ROWS else _MANY_ROWS_COLUMNS
        num_chunks = -(-max_seqlen // columns)
        grid = (rows * num_chunks,)
        chunk_counts = torch.empty(rows, num_chunks, dtype=torch.int32, device=device)
        tensors = (self.scores, count, key_end, self.state)
        sizes = (self.scores.stride(0), max_seqlen, topk, num_chunks)
        constants: dict[str, Any] = {"COLUMNS": columns}
        constants |= launch_options(_WARPS, 1) | overlap_options(device)
        with torch.cuda.device_of(key_end):
            if not is_counted:
                _count_kernel[grid](*tensors, *sizes, **constants)
            _list_kernel[grid](*tensors, self.listed, chunk_counts, *sizes, **constants)
            constants["BLOCK_CHUNKS"] = next_power_of_2(num_chunks)
            _write_kernel[grid](
                *tensors, self.listed, chunk_counts, topk_indices, *sizes, topk_indices.stride(0),
                **constants,
            )  # fmt: skip


def can_overlap(target: KernelTarget) -> bool:
    """Whether a launch can begin before the one before it ends."""
    return target.kind == "cuda" and int(target.arch) >= 90


def overlap_options(device: torch.device) -> dict[str, Any]:
    """What a launch takes that may begin before the one before it ends."""
    if not can_overlap(device_target(device)):
        return {"OVERLAPS": False}
    return {"OVERLAPS": True, "launch_pdl": True}


def select_cases(target: KernelTarget) -> list[CompileCase]:
    """The kernels as they are launched for one row and for many."""
    pointers = {
        "scores_ptr": "*fp32", "count_ptr": "*i32", "key_end_ptr": "*i32", "state_ptr": "*i32",
        "listed_ptr": "*i32", "chunk_counts_ptr": "*i32", "out_ptr": "*i32",
    }  # fmt: skip
    cases = []
    for columns in (_COLUMNS, _MANY_ROWS_COLUMNS):
        constants = {"COLUMNS": columns, "OVERLAPS": can_overlap(target)}
        for name, kernel, more in (
            ("count", _count_kernel, {}),
            ("list", _list_kernel, {}),
            ("write", _write_kernel, {"BLOCK_CHUNKS": 128}),
        ):
            signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
            name = f"{name} x{columns}"
            cases.append(CompileCase(name, kernel, signature, constants | more, _WARPS, 1))
    return cases
