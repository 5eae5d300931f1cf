# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The choice of the largest scores of every row in Triton: radix selection, many programs a row.

Three passes count the next digit of the scores that agree with the threshold found so far, the
highest digit first; the last program of a row finds the threshold's digit. A fourth pass counts
what every chunk of columns will give, a fifth writes columns in ascending order. Among equal scores
the lower columns win. `torch.topk` has one or few blocks for a row and orders ties by an algorithm
that depends on the number of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase
from model1.ops.kv_cache.portable import next_power_of_2
from model1.ops.launch import launch_options

# Of each digit of a 32-bit score. The first is counted in shared memory, where bins are dear.
_BITS = (8, 12, 12)
_NUM_BINS = sum(1 << bits for bits in _BITS)
# A row's bins, then programs that have counted each digit, the threshold's digits found so far, and
# how many scores are above them.
_DONE = tl.constexpr(_NUM_BINS)
_THRESHOLD = tl.constexpr(_NUM_BINS + 3)
_ABOVE = tl.constexpr(_NUM_BINS + 4)
_STATE = _NUM_BINS + 8
DIGIT_CONSTANTS: dict[str, Any] = {"STATE": _STATE, "BITS": _BITS}
SELECT_BYTES = 4 * _STATE  # of scratch memory that a row takes, and a little per chunk
_COLUMNS = 1024  # of a chunk where few rows have to fill the GPU
_MANY_ROWS_COLUMNS = 4096
_MANY_ROWS = 16
_FILL = tl.constexpr(1024)


@triton.jit
def num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk):
    """Visible columns of a row, and how many of them are chosen."""
    num_keys = tl.minimum(tl.maximum(tl.load(key_end_ptr + row), 0), max_seqlen)
    chosen = tl.minimum(num_keys, topk)
    if count_ptr is not None:
        chosen = tl.minimum(chosen, tl.load(count_ptr + row))
    return num_keys, chosen


@triton.jit
def _ordered(score):
    """Scores as unsigned integers in the same order; -0 is 0, NaN is above inf."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(score == score, bits, 0x7FFFFFFF)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _found(state_ptr):
    """The threshold's digits found so far, and how many scores are above them."""
    threshold = tl.load(state_ptr + _THRESHOLD).to(tl.uint32, bitcast=True)
    return threshold, tl.load(state_ptr + _ABOVE)


@triton.jit
def count_digits(
    state_ptr, score, is_key, wanted, num_programs, LEVEL: tl.constexpr, BITS: tl.constexpr
):
    """Adds a chunk's digits number LEVEL to the row's bins, of scores that may be the threshold.

    The last of the row's programs finds the digit of the wanted-th largest score.
    """
    NUM_BINS: tl.constexpr = 1 << BITS[LEVEL]
    SHIFT: tl.constexpr = (
        32 - BITS[0] - (BITS[1] if LEVEL > 0 else 0) - (BITS[2] if LEVEL > 1 else 0)
    )
    score = _ordered(score)
    digit = ((score >> SHIFT) & (NUM_BINS - 1)).to(tl.int32)
    every_bin = tl.arange(0, NUM_BINS)
    threshold, above = tl.full([], 0, tl.uint32), 0
    bins_ptr = state_ptr
    if LEVEL == 0:
        counts = tl.histogram(digit, NUM_BINS, mask=is_key)
        tl.atomic_add(bins_ptr + every_bin, counts, mask=counts > 0, sem="relaxed")
    else:
        threshold, above = _found(state_ptr)
        bins_ptr += (1 << BITS[0]) + ((1 << BITS[1]) if LEVEL > 1 else 0)
        is_near = is_key & ((score >> (SHIFT + BITS[LEVEL])) == threshold)
        tl.atomic_add(bins_ptr + digit, 1, mask=is_near, sem="relaxed")
    tl.debug_barrier()  # all threads have counted before one of them says so
    if tl.atomic_add(state_ptr + _DONE + LEVEL, 1) == num_programs - 1:
        counts = tl.load(bins_ptr + every_bin, cache_modifier=".cg")
        at_least = above + tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        found = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), 0) - 1, 0)
        above += tl.sum(tl.where(every_bin > found, counts, 0), 0)
        threshold = (threshold << BITS[LEVEL]) | found.to(tl.uint32)
        tl.store(state_ptr + _THRESHOLD, threshold.to(tl.int32, bitcast=True))
        tl.store(state_ptr + _ABOVE, above)


@triton.jit
def _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS: tl.constexpr):
    """Columns of a chunk, whether the row sees them, and their scores."""
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    is_key = column < num_keys
    at = scores_ptr + row.to(tl.int64) * stride_scores + column
    return column, is_key, tl.load(at, mask=is_key, other=0.0)


_SIZES = ["stride_scores", "max_seqlen", "topk", "num_chunks"]


@triton.jit(do_not_specialize=_SIZES)
def _count_digits_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr, stride_scores, max_seqlen, topk, num_chunks,
    LEVEL: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Counts a chunk's digits number LEVEL; state: [rows, STATE] int32, zeros at first."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    if chunk * COLUMNS >= num_keys:
        return
    _, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    state_ptr += row.to(tl.int64) * STATE
    count_digits(state_ptr, score, is_key, wanted, tl.cdiv(num_keys, COLUMNS), LEVEL, BITS)


@triton.jit(do_not_specialize=_SIZES)
def _count_chosen_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr, chunk_counts_ptr,
    stride_scores, max_seqlen, topk, num_chunks, STATE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """chunk_counts [rows, num_chunks, 2] int32: a chunk's scores above the threshold, and at it."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, _ = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    if chunk * COLUMNS >= num_keys:
        return
    threshold, _ = _found(state_ptr + row.to(tl.int64) * STATE)
    _, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    score = _ordered(score)
    chunk_counts_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(chunk_counts_ptr, tl.sum((is_key & (score > threshold)).to(tl.int32), 0))
    tl.store(chunk_counts_ptr + 1, tl.sum((is_key & (score == threshold)).to(tl.int32), 0))


@triton.jit(do_not_specialize=[*_SIZES, "stride_out"])
def _write_chosen_kernel(
    scores_ptr, count_ptr, key_end_ptr, state_ptr, chunk_counts_ptr, out_ptr,
    stride_scores, max_seqlen, topk, num_chunks, stride_out,
    STATE: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A chunk's chosen columns to their places in out [rows, stride_out] int32; -1 behind all."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    out_ptr += row.to(tl.int64) * stride_out
    for start in range(chunk * _FILL, topk, num_chunks * _FILL):
        place = start + tl.arange(0, _FILL)
        tl.store(out_ptr + place, -1, mask=(place >= wanted) & (place < topk))
    if (chunk * COLUMNS >= num_keys) | (wanted <= 0):
        return
    threshold, above = _found(state_ptr + row.to(tl.int64) * STATE)
    other = tl.arange(0, BLOCK_CHUNKS)
    at = chunk_counts_ptr + (row.to(tl.int64) * num_chunks + other) * 2
    above_before = tl.sum(tl.load(at, mask=other < chunk, other=0), 0)
    equal_before = tl.sum(tl.load(at + 1, mask=other < chunk, other=0), 0)
    column, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    score = _ordered(score)
    is_equal = (is_key & (score == threshold)).to(tl.int32)
    spare = wanted - above  # how many of the scores at the threshold are chosen
    equal_rank = equal_before + tl.cumsum(is_equal, 0) - is_equal
    is_chosen = (is_key & (score > threshold)) | ((is_equal != 0) & (equal_rank < spare))
    place = above_before + tl.minimum(equal_before, spare)
    place += tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + place, column, mask=is_chosen & (place < topk))


def empty_state(rows: int, device: torch.device) -> Tensor:
    """What `count_digits` works on, for the scores of so many rows."""
    return torch.zeros(rows, _STATE, dtype=torch.int32, device=device)


def store_largest(
    scores: Tensor, key_end: Tensor, count: Tensor | None, max_seqlen: int, topk_indices: Tensor,
    state: Tensor | None = None,
) -> None:  # fmt: skip
    """Columns of the count[i] largest of the first key_end[i] scores to topk_indices[i], ascending.

    scores: [>= rows, width] fp32; topk_indices: [rows, topk] int32, -1 behind the columns.
    count: [rows] int32, None = topk. state: of which the first digits are counted already.
    """
    rows, topk = topk_indices.shape
    columns = _COLUMNS if rows < _MANY_ROWS else _MANY_ROWS_COLUMNS
    num_chunks = -(-max_seqlen // columns)
    device = scores.device
    first_level = 0 if state is None else 1
    state = empty_state(rows, device) if state is None else state
    chunk_counts = torch.empty(rows, num_chunks, 2, dtype=torch.int32, device=device)
    grid = (rows * num_chunks,)
    constants: dict[str, Any] = {"STATE": _STATE, "COLUMNS": columns}
    constants |= launch_options(_num_warps(columns), 1)
    tensors, sizes = (scores, count, key_end, state), (scores.stride(0), max_seqlen, topk)
    with torch.cuda.device_of(scores):
        for level in range(first_level, len(_BITS)):
            digit: dict[str, Any] = {"LEVEL": level, "BITS": _BITS}
            _count_digits_kernel[grid](*tensors, *sizes, num_chunks, **digit, **constants)
        _count_chosen_kernel[grid](*tensors, chunk_counts, *sizes, num_chunks, **constants)
        constants["BLOCK_CHUNKS"] = next_power_of_2(num_chunks)
        _write_chosen_kernel[grid](
            *tensors, chunk_counts, topk_indices, *sizes, num_chunks, topk_indices.stride(0),
            **constants,
        )  # fmt: skip


def _num_warps(columns: int) -> int:
    return 4 if columns == _COLUMNS else 8


def select_cases() -> list[CompileCase]:
    """The kernels as they are launched for one row and for many."""
    pointers = {
        "scores_ptr": "*fp32", "count_ptr": "*i32", "key_end_ptr": "*i32", "state_ptr": "*i32",
        "chunk_counts_ptr": "*i32", "out_ptr": "*i32",
    }  # fmt: skip
    cases = []
    for columns in (_COLUMNS, _MANY_ROWS_COLUMNS):
        constants, num_warps = {"STATE": _STATE, "COLUMNS": columns}, _num_warps(columns)
        for name, kernel, more in (
            ("count_digits 1", _count_digits_kernel, {"LEVEL": 0, "BITS": _BITS}),
            ("count_digits 3", _count_digits_kernel, {"LEVEL": 2, "BITS": _BITS}),
            ("count_chosen", _count_chosen_kernel, {}),
            ("write_chosen", _write_chosen_kernel, {"BLOCK_CHUNKS": 128}),
        ):
            signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
            name = f"{name} x{columns}"
            cases.append(CompileCase(name, kernel, signature, constants | more, num_warps, 1))
    return cases
