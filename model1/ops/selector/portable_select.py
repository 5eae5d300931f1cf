# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""The choice of the largest scores of every row in Triton: radix selection, many programs a row.

Three passes count the next digit of the scores that agree with the threshold found so far, the
highest digit first; a fourth counts what every chunk of columns will give, a fifth writes columns
in ascending order. Among equal scores the lower columns win. `torch.topk` has one or few blocks
for a row and orders ties by an algorithm that depends on the number of rows.
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

_BITS = (11, 11, 10)  # of each digit of a 32-bit score
_NUM_BINS = sum(1 << bits for bits in _BITS)
SELECT_BYTES = 4 * _NUM_BINS  # of scratch memory that a row takes, and a little per chunk
_COLUMNS = 1024  # of a chunk where few rows have to fill the GPU
_MANY_ROWS_COLUMNS = 4096
_MANY_ROWS = 16


@triton.jit
def _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk):
    """Visible columns of a row, and how many of them are chosen."""
    num_keys = tl.minimum(tl.maximum(tl.load(key_end_ptr + row), 0), max_seqlen)
    chosen = tl.minimum(num_keys, topk)
    if count_ptr is not None:
        chosen = tl.minimum(chosen, tl.load(count_ptr + row))
    return num_keys, chosen


@triton.jit
def _threshold(counts_ptr, wanted, LEVELS, BITS):
    """The leading digits of the wanted-th largest number, and how many numbers are above them."""
    threshold, above = tl.full([], 0, tl.uint32), 0
    for level in tl.static_range(LEVELS):
        digit = tl.arange(0, 1 << BITS[level])
        counts = tl.load(counts_ptr + digit)
        at_least = above + tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        found = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), 0) - 1, 0)
        above += tl.sum(tl.where(digit > found, counts, 0), 0)
        threshold = (threshold << BITS[level]) | found.to(tl.uint32)
        counts_ptr += 1 << BITS[level]
    return threshold, above


@triton.jit
def _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS: tl.constexpr):
    """Columns of a chunk, whether the row sees them, and their scores as ordered integers.

    -0 is 0, NaN is above inf.
    """
    column = chunk * COLUMNS + tl.arange(0, COLUMNS)
    is_key = column < num_keys
    score = tl.load(scores_ptr + row.to(tl.int64) * stride_scores + column, mask=is_key, other=0.0)
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, ~bits, bits ^ -0x80000000)
    return column, is_key, ordered.to(tl.uint32, bitcast=True)


_SIZES = ["stride_scores", "max_seqlen", "topk", "num_chunks"]


@triton.jit(do_not_specialize=_SIZES)
def _count_digits_kernel(
    scores_ptr, count_ptr, key_end_ptr, counts_ptr, stride_scores, max_seqlen, topk, num_chunks,
    LEVEL: tl.constexpr, BITS: tl.constexpr, NUM_BINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds a chunk's digits number LEVEL to the row's counts, of scores that may be the threshold.

    counts: [rows, NUM_BINS] int32, the bins of one level after the other's.
    """
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    if chunk * COLUMNS >= num_keys:
        return
    counts_ptr += row.to(tl.int64) * NUM_BINS
    _, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    SHIFT: tl.constexpr = (
        32 - BITS[0] - (BITS[1] if LEVEL > 0 else 0) - (BITS[2] if LEVEL > 1 else 0)
    )
    first_bin = 0
    if LEVEL > 0:
        prefix, _ = _threshold(counts_ptr, wanted, LEVEL, BITS)
        is_key = is_key & ((score >> (SHIFT + BITS[LEVEL])) == prefix)
        first_bin = (1 << BITS[0]) + ((1 << BITS[1]) if LEVEL > 1 else 0)
    digit = ((score >> SHIFT) & ((1 << BITS[LEVEL]) - 1)).to(tl.int32)
    tl.atomic_add(counts_ptr + first_bin + digit, 1, mask=is_key, sem="relaxed")


@triton.jit(do_not_specialize=_SIZES)
def _count_chosen_kernel(
    scores_ptr, count_ptr, key_end_ptr, counts_ptr, chunk_counts_ptr,
    stride_scores, max_seqlen, topk, num_chunks,
    BITS: tl.constexpr, NUM_BINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """chunk_counts [rows, num_chunks, 2] int32: a chunk's scores above the threshold, and at it."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    if chunk * COLUMNS >= num_keys:
        return
    threshold, _ = _threshold(counts_ptr + row.to(tl.int64) * NUM_BINS, wanted, 3, BITS)
    _, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    chunk_counts_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(chunk_counts_ptr, tl.sum((is_key & (score > threshold)).to(tl.int32), 0))
    tl.store(chunk_counts_ptr + 1, tl.sum((is_key & (score == threshold)).to(tl.int32), 0))


@triton.jit(do_not_specialize=[*_SIZES, "stride_out"])
def _write_chosen_kernel(
    scores_ptr, count_ptr, key_end_ptr, counts_ptr, chunk_counts_ptr, out_ptr,
    stride_scores, max_seqlen, topk, num_chunks, stride_out,
    BITS: tl.constexpr, NUM_BINS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_CHUNKS: tl.constexpr,
):  # fmt: skip
    """A chunk's chosen columns to their places in out [rows, stride_out] int32."""
    row, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
    num_keys, wanted = _num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk)
    if (chunk * COLUMNS >= num_keys) | (wanted <= 0):
        return
    threshold, above = _threshold(counts_ptr + row.to(tl.int64) * NUM_BINS, wanted, 3, BITS)
    other = tl.arange(0, BLOCK_CHUNKS)
    at = chunk_counts_ptr + (row.to(tl.int64) * num_chunks + other) * 2
    above_before = tl.sum(tl.load(at, mask=other < chunk, other=0), 0)
    equal_before = tl.sum(tl.load(at + 1, mask=other < chunk, other=0), 0)
    column, is_key, score = _chunk(scores_ptr, row, stride_scores, num_keys, chunk, COLUMNS)
    is_equal = (is_key & (score == threshold)).to(tl.int32)
    spare = wanted - above  # how many of the scores at the threshold are chosen
    equal_rank = equal_before + tl.cumsum(is_equal, 0) - is_equal
    is_chosen = (is_key & (score > threshold)) | ((is_equal != 0) & (equal_rank < spare))
    place = above_before + tl.minimum(equal_before, spare)
    place += tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    out_ptr += row.to(tl.int64) * stride_out
    tl.store(out_ptr + place, column, mask=is_chosen & (place < topk))


def store_largest(
    scores: Tensor, key_end: Tensor, count: Tensor | None, max_seqlen: int, topk_indices: Tensor
) -> None:
    """Columns of the count[i] largest of the first key_end[i] scores to topk_indices[i], ascending.

    scores: [>= rows, width] fp32; topk_indices: [rows, topk] int32, changed where a column goes.
    count: [rows] int32, None = topk.
    """
    rows, topk = topk_indices.shape
    columns = _COLUMNS if rows < _MANY_ROWS else _MANY_ROWS_COLUMNS
    num_chunks = -(-max_seqlen // columns)
    device = scores.device
    counts = torch.zeros(rows, _NUM_BINS, dtype=torch.int32, device=device)
    chunk_counts = torch.empty(rows, num_chunks, 2, dtype=torch.int32, device=device)
    grid = (rows * num_chunks,)
    constants: dict[str, Any] = _constants(columns) | launch_options(_num_warps(columns), 1)
    tensors, sizes = (scores, count, key_end, counts), (scores.stride(0), max_seqlen, topk)
    with torch.cuda.device_of(scores):
        for level in range(len(_BITS)):
            constants["LEVEL"] = level
            _count_digits_kernel[grid](*tensors, *sizes, num_chunks, **constants)
        del constants["LEVEL"]
        _count_chosen_kernel[grid](*tensors, chunk_counts, *sizes, num_chunks, **constants)
        constants["BLOCK_CHUNKS"] = next_power_of_2(num_chunks)
        _write_chosen_kernel[grid](
            *tensors, chunk_counts, topk_indices, *sizes, num_chunks, topk_indices.stride(0),
            **constants,
        )  # fmt: skip


def _constants(columns: int) -> dict[str, Any]:
    return {"BITS": _BITS, "NUM_BINS": _NUM_BINS, "COLUMNS": columns}


def _num_warps(columns: int) -> int:
    return 4 if columns == _COLUMNS else 8


def select_cases() -> list[CompileCase]:
    """The kernels as they are launched for one row and for many."""
    pointers = {
        "scores_ptr": "*fp32", "count_ptr": "*i32", "key_end_ptr": "*i32", "counts_ptr": "*i32",
        "chunk_counts_ptr": "*i32", "out_ptr": "*i32",
    }  # fmt: skip
    cases = []
    for columns in (_COLUMNS, _MANY_ROWS_COLUMNS):
        constants, num_warps = _constants(columns), _num_warps(columns)
        for name, kernel, more in (
            ("count_digits", _count_digits_kernel, {"LEVEL": 2}),
            ("count_chosen", _count_chosen_kernel, {}),
            ("write_chosen", _write_chosen_kernel, {"BLOCK_CHUNKS": 128}),
        ):
            signature = dict.fromkeys(kernel.arg_names, "i32") | pointers
            name = f"{name} x{columns}"
            cases.append(CompileCase(name, kernel, signature, constants | more, num_warps, 1))
    return cases
