# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Only constexpr parameters of a kernel carry types, and tl.static_range exists only when compiled.
"""Radix selection by many programs a row: what one launch leaves for the next. Triton.

A first digit on a logarithmic scale leaves few scores, whose exact order seven bits at a time
settle. A row's state, int32: how many scores have each first digit, and how many are listed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# First digits: four per power of two from 2^-48 on, 0 for what is below, the last for all above.
_NUM_BINS = tl.constexpr(256)
_SHIFT = tl.constexpr(21)
_LOWEST = tl.constexpr((0x80000000 | (127 - 48) << 23) >> 21)
_LENGTH = _NUM_BINS
STATE = tl.constexpr(256 + 32)  # whole cache lines
_BITS = tl.constexpr(7)  # of the other digits; more bins would cost more than another round
_NEXT_BINS = tl.constexpr(1 << 7)
# Listed scores that stay in registers, and those of longer lists that are looked at together.
_LIST = tl.constexpr(512)
_MORE = tl.constexpr(1024)


@triton.jit
def clear_state(state_ptr, num_words):
    """Zeros the state of all rows, by the programs of a launch together."""
    step = tl.num_programs(0) * _LIST
    for first in range(tl.program_id(0) * _LIST, num_words, step):
        at = first + tl.arange(0, _LIST)
        tl.store(state_ptr + at, 0, mask=at < num_words)


@triton.jit
def num_chosen(count_ptr, key_end_ptr, row, max_seqlen, topk):
    """Visible columns of a row, and how many of them are chosen."""
    num_keys = tl.minimum(tl.maximum(tl.load(key_end_ptr + row), 0), max_seqlen)
    chosen = tl.minimum(num_keys, topk)
    if count_ptr is not None:
        chosen = tl.minimum(chosen, tl.load(count_ptr + row))
    return num_keys, chosen


@triton.jit
def await_launch(OVERLAPS: tl.constexpr):
    """Waits until the launch before is done, if this one may have begun earlier; lets the next."""
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def ordered(score):
    """Scores as unsigned integers in the same order; -0 is 0, NaN is above inf."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(score == score, bits, 0x7FFFFFFF)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def first_digit(score):
    """The first digit of ordered scores."""
    digit = (score >> _SHIFT).to(tl.int32) - _LOWEST
    return tl.minimum(tl.maximum(digit, 0), _NUM_BINS - 1)


@triton.jit
def count_first(state_ptr, score, is_key):
    """Adds a chunk's first digits to the row's."""
    counts = tl.histogram(first_digit(ordered(score)), _NUM_BINS, mask=is_key)
    every_bin = tl.arange(0, _NUM_BINS)
    tl.atomic_add(state_ptr + every_bin, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _bin_of(counts, wanted, NUM_BINS: tl.constexpr):
    """The bin of the wanted-th largest, and how many scores are in higher ones."""
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    found = tl.maximum(tl.sum((at_least >= wanted).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(tl.arange(0, NUM_BINS) > found, counts, 0), 0)
    return found, above


@triton.jit
def find_first(state_ptr, wanted):
    """The threshold's first digit, and how many scores have a higher one."""
    counts = tl.load(state_ptr + tl.arange(0, _NUM_BINS))
    return _bin_of(counts, wanted, _NUM_BINS)


@triton.jit
def list_chunk(state_ptr, listed_ptr, width, score, column, is_listed):
    """Appends ordered scores and their columns to the row's list, [2, width], in any order."""
    listed = is_listed.to(tl.int32)
    first = tl.atomic_add(state_ptr + _LENGTH, tl.sum(listed, 0), sem="relaxed")
    place = first + tl.cumsum(listed, 0) - 1
    tl.store(listed_ptr + place, score.to(tl.int32, bitcast=True), mask=is_listed)
    tl.store(listed_ptr + width + place, column, mask=is_listed)


@triton.jit
def _load_listed(listed_ptr, first, length, COUNT: tl.constexpr):
    place = first + tl.arange(0, COUNT)
    score = tl.load(listed_ptr + place, mask=place < length, other=0)
    return score.to(tl.uint32, bitcast=True), place < length


@triton.jit
def _count_next(score, is_listed, found):
    """How many scores have each next digit, of those whose digits above are the found ones."""
    is_near = is_listed & ((score >> _BITS) == found)
    return tl.histogram((score & (_NEXT_BINS - 1)).to(tl.int32), _NEXT_BINS, mask=is_near)


@triton.jit
def _count_before(score, is_listed, column, start, threshold):
    """Listed scores before `start` that are above the threshold, and equal to it."""
    is_before = is_listed & (column.to(tl.int32) < start)
    above = tl.sum((is_before & (score > threshold)).to(tl.int32), 0)
    return above, tl.sum((is_before & (score == threshold)).to(tl.int32), 0)


@triton.jit
def find_threshold(state_ptr, listed_ptr, width, digit, wanted, start):
    """The wanted-th largest of the listed scores, how many of those equal to it are chosen, and how
    many listed scores of columns before `start` are above it and equal to it.

    digit: their first; the lowest and the highest share no further bits. The list is seldom longer
    than what stays in registers.
    """
    length = tl.load(state_ptr + _LENGTH)
    some, is_some = _load_listed(listed_ptr, 0, length, _LIST)
    is_open = (digit == 0) | (digit == _NUM_BINS - 1)
    base = tl.where(digit == 0, 0, digit + _LOWEST).to(tl.uint32) << _SHIFT
    top = tl.where(is_open, 4, 2) * _BITS
    found = tl.full([], 0, tl.uint32)
    for below in range(0, top + 1, _BITS):
        shift = (top - below).to(tl.uint32)
        counts = _count_next((some - base) >> shift, is_some, found)
        for first in range(_LIST, length, _MORE):
            more, is_more = _load_listed(listed_ptr, first, length, _MORE)
            counts += _count_next((more - base) >> shift, is_more, found)
        next_digit, above = _bin_of(counts, wanted, _NEXT_BINS)
        wanted -= above
        found = (found << _BITS) | next_digit.to(tl.uint32)
    threshold = base + found
    columns, is_some = _load_listed(listed_ptr + width, 0, length, _LIST)
    above_before, equal_before = _count_before(some, is_some, columns, start, threshold)
    for first in range(_LIST, length, _MORE):
        more, is_more = _load_listed(listed_ptr, first, length, _MORE)
        column, is_more = _load_listed(listed_ptr + width, first, length, _MORE)
        above, equal = _count_before(more, is_more, column, start, threshold)
        above_before += above
        equal_before += equal
    return threshold, wanted, above_before, equal_before
