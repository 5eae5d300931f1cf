# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The choice of the largest scores of every row in Triton: one launch, many programs a row.

A program's number says in which order it has started. The first third bring the scores of a chunk
of columns and count their first digits, the second third list the scores with the threshold's
digit, the last third find the threshold among these and write their chunk's columns, in ascending
order. Among equal scores the lower columns win. Programs wait for lower numbers alone, which have
started: any number of them may run at a time, and where they run one after the other none waits.
`torch.topk` has one or few blocks for a row and orders ties by an algorithm that depends on the
number of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import launch_options
from model1.ops.selector.portable_digits import (
    COUNTED,
    LISTED,
    STATE,
    count_first,
    find_first,
    find_threshold,
    first_digit,
    list_chunk,
    ordered,
    wait_for,
)
from model1.ops.selector.portable_votes import tally

_FILL = tl.constexpr(1024)
_STAGES = 3
_FEW_ROWS = 8  # have to fill the GPU
# Columns of a chunk: of few rows, where votes are summed up, and otherwise.
_COLUMNS, _TALLY_COLUMNS, _MANY_ROWS_COLUMNS = 512, 1024, 2048


@triton.jit
def _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk):
    """Visible columns of a row, and how many of them are chosen."""
    num_keys = tl.minimum(tl.maximum(tl.load(key_end_ptr + row), 0), max_seqlen)
    chosen = tl.minimum(num_keys, topk)
    if count_ptr is not None:
        chosen = tl.minimum(chosen, tl.load(count_ptr + row))
    return num_keys, chosen


@triton.jit
def _fill(out_ptr, wanted, topk, chunk, num_chunks):
    """-1 behind the chosen, by all chunks together."""
    for start in range(chunk * _FILL, topk, num_chunks * _FILL):
        place = start + tl.arange(0, _FILL)
        tl.store(out_ptr + place, -1, mask=(place >= wanted) & (place < topk))


@triton.jit(
    do_not_specialize=[
        "rows", "stride_scores", "max_seqlen", "topk", "num_chunks", "stride_out", "num_splits",
        "num_tiles", "window",
    ]
)  # fmt: skip
def _choose_kernel(
    scores_ptr,  # [rows, stride_scores] fp32: given, or votes, which the first third write
    count_ptr,
    key_end_ptr,
    state_ptr,  # [rows * STATE + 1] int32, zeros: of every row, and the last program's number
    listed_ptr,  # [rows, 2, stride_scores] int32
    chunk_counts_ptr,  # [rows, num_chunks] int32: scores above the threshold's first digit
    out_ptr,  # [rows, stride_out] int32
    weights_ptr,  # None: scores are given
    largest_ptr,
    partial_ptr,
    lse_ptr,
    rows,
    stride_scores,
    max_seqlen,
    topk,
    num_chunks,
    stride_out,
    num_splits,
    num_tiles,
    window,
    H: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    """The columns of the largest scores, and -1 behind them."""
    number = tl.atomic_add(state_ptr + rows.to(tl.int64) * STATE, 1, sem="relaxed")
    third, item = number // (rows * num_chunks), number % (rows * num_chunks)
    row, chunk = item // num_chunks, item % num_chunks
    num_keys, wanted = _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    local, start = row.to(tl.int64), chunk * COLUMNS
    is_used = start < num_keys
    column = start + tl.arange(0, COLUMNS)
    is_key = column < num_keys
    at = scores_ptr + local * stride_scores + column
    state_ptr += local * STATE
    listed_ptr += 2 * local * stride_scores
    chunk_counts_ptr += local * num_chunks
    if third == 0:
        if weights_ptr is not None:
            if is_used | (chunk == 0):
                score = tally(
                    weights_ptr, largest_ptr, partial_ptr, lse_ptr, row, start, num_keys,
                    num_splits, num_tiles, H, TILE, COLUMNS,
                )  # fmt: skip
                score = tl.where(column >= num_keys - window, float("inf"), score)
                tl.store(at, score, mask=is_key)
                if is_used:
                    count_first(state_ptr, score, is_key)
        elif is_used:
            count_first(state_ptr, tl.load(at, mask=is_key, other=0.0), is_key)
    elif third == 1:
        if is_used & (wanted > 0):
            wait_for(state_ptr + COUNTED, tl.cdiv(num_keys, COLUMNS))
            found, _ = find_first(state_ptr, wanted)
            score = ordered(tl.load(at, mask=is_key, other=0.0, cache_modifier=".cg"))
            digit = first_digit(score)
            above = tl.sum((is_key & (digit > found)).to(tl.int32), 0)
            tl.store(chunk_counts_ptr + chunk, above)
            list_chunk(
                state_ptr, listed_ptr, stride_scores, score, column, is_key & (digit == found)
            )
    else:
        out_ptr += local * stride_out
        _fill(out_ptr, wanted, topk, chunk, num_chunks)
        if is_used & (wanted > 0):
            wait_for(state_ptr + LISTED, tl.cdiv(num_keys, COLUMNS))
            found, above = find_first(state_ptr, wanted)
            other = tl.arange(0, BLOCK_CHUNKS)
            counts = tl.load(
                chunk_counts_ptr + other, mask=other < chunk, other=0, cache_modifier=".cg"
            )
            score = ordered(tl.load(at, mask=is_key, other=0.0, cache_modifier=".cg"))
            threshold, spare, above_before, equal_before = find_threshold(
                state_ptr, listed_ptr, stride_scores, found, wanted - above, start
            )
            is_equal = (is_key & (score == threshold)).to(tl.int32)
            equal_rank = equal_before + tl.cumsum(is_equal, 0) - is_equal
            is_chosen = is_key & (score > threshold) | ((is_equal != 0) & (equal_rank < spare))
            place = tl.sum(counts, 0) + above_before + tl.minimum(equal_before, spare)
            place += tl.cumsum(is_chosen.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, column, mask=is_chosen & (place < topk))


def select_bytes(max_seqlen: int) -> int:
    """Scratch memory that the choice takes for a row, its scores included."""
    return 4 * (3 * padded_width(max_seqlen) + STATE.value + -(-max_seqlen // _COLUMNS))


def padded_width(max_seqlen: int) -> int:
    """Scores from one row to the next: a multiple of 16 bytes."""
    return -(-max_seqlen // 4) * 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The scores of a chunk of rows, and what choosing the largest of them takes.

    Whoever writes the scores clears the state, for every chunk of rows.
    """

    scores: Tensor  # [rows, width] fp32
    state: Tensor  # int32
    listed: Tensor  # [rows, 2, width] int32

    @classmethod
    def empty(cls, rows: int, max_seqlen: int, device: torch.device) -> Choice:
        """Memory for so many rows and columns."""
        width = padded_width(max_seqlen)
        return cls(
            torch.empty(rows, width, dtype=torch.float32, device=device),
            torch.empty(rows * STATE.value + 1, dtype=torch.int32, device=device),
            torch.empty(rows, 2, width, dtype=torch.int32, device=device),
        )

    @property
    def state_arguments(self) -> dict[str, Any]:
        """What a kernel takes to clear the state."""
        return {"state_ptr": self.state, "state_words": len(self.state)}

    def store_largest(
        self, key_end: Tensor, count: Tensor | None, max_seqlen: int, topk_indices: Tensor,
        weights: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Columns of the count[i] largest of the first key_end[i] scores, to topk_indices[i].

        topk_indices: [rows, topk] int32, ascending, -1 behind. count: [rows] int32, None = topk.
        weights: of which the scores are to be made, the arguments of `tally`.
        """
        rows, topk = topk_indices.shape
        columns = _num_columns(rows, is_tally=weights is not None)
        num_chunks = -(-max_seqlen // columns)
        chunk_counts = torch.empty(rows, num_chunks, dtype=torch.int32, device=key_end.device)
        with torch.cuda.device_of(self.scores):
            _choose_kernel[(_STAGES * rows * num_chunks,)](
                self.scores, count, key_end, self.state, self.listed, chunk_counts, topk_indices,
                rows=rows, stride_scores=self.scores.stride(0), max_seqlen=max_seqlen, topk=topk,
                num_chunks=num_chunks, stride_out=topk_indices.stride(0),
                **_chunk_constants(columns, num_chunks), **(weights or _NO_WEIGHTS | _NO_SIZES),
                **launch_options(_num_warps(columns), 1),
            )  # fmt: skip


_NO_WEIGHTS: dict[str, Any] = {
    "weights_ptr": None, "largest_ptr": None, "partial_ptr": None, "lse_ptr": None, "H": 0,
    "TILE": 0,
}  # fmt: skip


_NO_SIZES = {"num_splits": 0, "num_tiles": 0, "window": 0}


def _num_columns(rows: int, *, is_tally: bool) -> int:
    if rows < _FEW_ROWS:
        return _COLUMNS
    return _TALLY_COLUMNS if is_tally else _MANY_ROWS_COLUMNS


def _chunk_constants(columns: int, num_chunks: int) -> dict[str, Any]:
    return {"COLUMNS": columns, "BLOCK_CHUNKS": next_power_of_2(num_chunks)}


def _num_warps(columns: int) -> int:
    return 8 if columns == _MANY_ROWS_COLUMNS else 4


def select_case(name: str, columns: int, constants: dict[str, Any]) -> CompileCase:
    """The choice for up to 64k or 128k columns; `constants`: those of `tally`, or none."""
    pointers = {
        "scores_ptr": "*fp32", "count_ptr": "*i32", "key_end_ptr": "*i32", "state_ptr": "*i32",
        "listed_ptr": "*i32", "chunk_counts_ptr": "*i32", "out_ptr": "*i32",
        "weights_ptr": "*u16", "largest_ptr": "*fp32", "partial_ptr": "*fp32", "lse_ptr": "*fp32",
    }  # fmt: skip
    signature = dict.fromkeys(_choose_kernel.arg_names, "i32") | pointers
    constants = (constants or _NO_WEIGHTS) | _chunk_constants(columns, 128)
    num_warps = _num_warps(columns)
    return CompileCase(name, _choose_kernel, signature, constants, num_warps, 1)


def select_cases() -> list[CompileCase]:
    """The kernel as it is launched for given scores of one row and of many."""
    return [select_case(f"choose x{n}", n, {}) for n in (_COLUMNS, _MANY_ROWS_COLUMNS)]


def tally_cases(h: int, tile: int) -> list[CompileCase]:
    """The kernel as it is launched for weights of one row and of many."""
    return [
        select_case(f"choose h{h} x{n}", n, {"H": h, "TILE": tile})
        for n in (_COLUMNS, _TALLY_COLUMNS)
    ]
