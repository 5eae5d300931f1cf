# pyright: reportMissingParameterType=none, reportGeneralTypeIssues=none
# Run-time parameters of a Triton kernel have no Python type.
"""Who attends to what: lists of items of work for persistent programs, made on the device.

A row, one query of one request, has as many pairs of key blocks as its lists fill, at least one.
An item is a range of blocks of one row. Program c of G finds the number of its items in the first
field of entry 0 of its list; they are entries 1, 2, ... and behind them stands one without slots,
whose blocks never end. The fields of an item: request, query, first block, block behind the last,
number of the partial result (-1: the row is whole), entries of the main list, of the extra list.

`whole_items` gives every row to one program: no partial results, and a row's bits depend on
nothing else. `split_items` cuts the sequence of all rows, after `rounds` rows for each program,
into parts of equal length, which leave at most two partial results per program: number 2c of a row
that began in an earlier program, 2c + 1 of one that goes on in a later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import KernelTarget
from model1.ops.hopper.overlap import release_successor
from model1.ops.launch import device_target, launch_options

ITEM_FIELDS = 8
_FIELDS = tl.constexpr(ITEM_FIELDS)
_PAIR = tl.constexpr(128)  # tokens of two blocks
_BLOCK = tl.constexpr(64)
_NEVER = tl.constexpr(1 << 30)
_TOLERANCE = tl.constexpr(2)  # pairs by which a cut moves to a row's end; about a merge's cost
_STEP = tl.constexpr(64)  # requests of a program that ranks them
_MAX_SORTED = 1024  # requests; more rows per program even out unsorted
_WHOLE_WARPS = 4
_SPLIT_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """The lists of b requests with s_q queries each: entries at most, and in fact if known.

    queries > 1: lengths are of single rows, b of them with s_q = 1, of requests with so many.
    """

    b: int
    s_q: int
    topk: int
    extra_topk: int
    length: Tensor | None
    extra_length: Tensor | None
    device: torch.device
    queries: int = 1

    @property
    def rows(self) -> int:
        """Queries of all requests."""
        return self.b * self.s_q

    @property
    def max_pairs(self) -> int:
        """Pairs of blocks of a row whose lists are full."""
        return max(1, -(-(-(-self.topk // 64) + -(-self.extra_topk // 64)) // 2))

    @property
    def has_length(self) -> bool:
        """Whether only the device knows how long the lists are."""
        return self.length is not None or self.extra_length is not None


@triton.jit
def _entries(length_ptr, request, mask, topk):
    """How many entries of a list count."""
    count = tl.full(request.shape, topk, tl.int32)
    if length_ptr is not None:
        length = tl.load(length_ptr + request, mask=mask, other=0)
        count = tl.minimum(tl.maximum(length, 0), count)
    return count


@triton.jit
def _pairs(main, extra):
    """Pairs of blocks of a row; one without any entry has an empty one."""
    blocks = (main + _BLOCK - 1) // _BLOCK + (extra + _BLOCK - 1) // _BLOCK
    return tl.maximum((blocks + 1) // 2, 1)


@triton.jit
def _store_item(at, request, query, first, end, slot, main, extra, mask):
    tl.store(at, request, mask=mask)
    tl.store(at + 1, query, mask=mask)
    tl.store(at + 2, first, mask=mask)
    tl.store(at + 3, end, mask=mask)
    tl.store(at + 4, slot, mask=mask)
    tl.store(at + 5, main, mask=mask)
    tl.store(at + 6, extra, mask=mask)


@triton.jit
def _store_ends(items_ptr, item_stride, program, num_items, mask):
    """The first entry and the one behind the last item."""
    zero = program * 0
    tl.store(items_ptr + program * item_stride, num_items, mask=mask)
    at = items_ptr + program * item_stride + (num_items + 1) * _FIELDS
    _store_item(at, zero, zero, zero, zero + _NEVER, zero - 1, zero, zero, mask)


@triton.jit
def _whole_items_kernel(
    items_ptr, length_ptr, extra_length_ptr, item_stride, b, s_q, topk, extra_topk, queries,
    num_programs, IS_SORTED: tl.constexpr, BLOCK_G: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Long requests first, in rounds that go to and fro over the programs."""
    if OVERLAPS:
        release_successor()
    request = tl.program_id(0) * _STEP + tl.arange(0, _STEP)
    mask = request < b
    main = _entries(length_ptr, request, mask, topk)
    extra = _entries(extra_length_ptr, request, mask, extra_topk)
    pairs = _pairs(main, extra)
    rank = request
    if IS_SORTED:
        rank = tl.zeros([_STEP], tl.int32)
        for first in range(0, b, _STEP):
            other = first + tl.arange(0, _STEP)
            is_other = other < b
            longer = _pairs(
                _entries(length_ptr, other, is_other, topk),
                _entries(extra_length_ptr, other, is_other, extra_topk),
            )
            is_before = (longer[None, :] > pairs[:, None]) | (
                (longer[None, :] == pairs[:, None]) & (other[None, :] < request[:, None])
            )
            rank += tl.sum((is_before & is_other[None, :]).to(tl.int32), 1)
    for query in range(0, s_q):
        place = rank * s_q + query
        round_, place = place // num_programs, place % num_programs
        program = tl.where(round_ % 2 == 0, place, num_programs - 1 - place)
        at = items_ptr + program * item_stride + (1 + round_) * _FIELDS
        zero = request * 0
        _store_item(
            at, request // queries, request % queries + query, zero, 2 * pairs, zero - 1, main,
            extra, mask,
        )  # fmt: skip
    if tl.program_id(0) == 0:
        program = tl.arange(0, BLOCK_G)
        rounds, rest = b * s_q // num_programs, b * s_q % num_programs
        place = tl.where(rounds % 2 == 0, program, num_programs - 1 - program)
        num_items = rounds + (place < rest).to(tl.int32)
        _store_ends(items_ptr, item_stride, program, num_items, program < num_programs)


@triton.jit
def _snapped(cut, start, end, is_row, tolerance):
    """The end of a row that is near a cut, else the cut."""
    far = 2 * tolerance + 1
    distance = tl.where(is_row, tl.minimum(tl.abs(start - cut), tl.abs(end - cut)), far)
    nearest = tl.min(distance, 0)
    below = tl.max((is_row & ((start == cut - nearest) | (end == cut - nearest))).to(tl.int32), 0)
    moved = tl.where(below > 0, cut - nearest, cut + nearest)
    return tl.where(nearest <= tolerance, moved, cut)


@triton.jit
def _split_items_kernel(
    items_ptr, bounds_ptr, spans_ptr, length_ptr, extra_length_ptr, item_stride, b, s_q, topk,
    extra_topk, num_programs, rounds, BLOCK_R: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """The items of one program: `rounds` whole rows, then its part of the others."""
    if OVERLAPS:
        release_successor()
    program = tl.program_id(0)
    first_row = rounds * num_programs
    row = first_row + tl.arange(0, BLOCK_R)
    is_row = row < b * s_q
    request = tl.where(is_row, row // s_q, 0)
    main = _entries(length_ptr, request, is_row, topk)
    extra = _entries(extra_length_ptr, request, is_row, extra_topk)
    pairs = tl.where(is_row, _pairs(main, extra), 0)
    end = tl.cumsum(pairs, 0)
    start, total = end - pairs, tl.sum(pairs, 0)
    tolerance = tl.minimum(total // num_programs // 4, _TOLERANCE)
    cut = (total.to(tl.int64) * program // num_programs).to(tl.int32)
    cut = _snapped(cut, start, end, is_row, tolerance)
    next_cut = (total.to(tl.int64) * (program + 1) // num_programs).to(tl.int32)
    next_cut = _snapped(next_cut, start, end, is_row, tolerance)
    for i in range(0, rounds):
        whole = i * num_programs + program
        at = items_ptr + program * item_stride + (1 + i) * _FIELDS
        blocks = 2 * _pairs(topk + 0, extra_topk)
        _store_item(at, whole // s_q, whole % s_q, 0, blocks, -1, topk, extra_topk, whole >= 0)
    is_mine = is_row & (end > cut) & (start < next_cut) & (cut < next_cut)
    place = 1 + rounds + tl.cumsum(is_mine.to(tl.int32), 0) - 1
    is_whole = (start >= cut) & (end <= next_cut)
    slot = tl.where(is_whole, -1, 2 * program + (start >= cut).to(tl.int32))
    first, last = tl.maximum(start, cut) - start, tl.minimum(end, next_cut) - start
    at = items_ptr + program * item_stride + place * _FIELDS
    _store_item(at, request, row % s_q, 2 * first, 2 * last, slot, main, extra, is_mine)
    count = rounds + tl.sum(is_mine.to(tl.int32), 0)
    _store_ends(items_ptr, item_stride, program, count, program >= 0)
    tl.store(bounds_ptr + program, cut)
    if program == num_programs - 1:
        tl.store(bounds_ptr + num_programs, next_cut)
    if program == 0:
        index = tl.arange(0, BLOCK_R)
        tl.store(spans_ptr + 2 * index, start, mask=is_row)
        tl.store(spans_ptr + 2 * index + 1, end, mask=is_row)


def _overlaps(device: torch.device) -> bool:
    """Whether the kernel that reads the list starts before this one has ended: sm_90 can."""
    return device.type == "cuda" and device_target(device) == KernelTarget("cuda", 90)


def whole_items(lists: Lists, num_programs: int) -> Tensor:
    """[num_programs, entries, ITEM_FIELDS] int32, every row in one item."""
    entries = -(-lists.rows // num_programs) + 2
    items = torch.empty(num_programs, entries, ITEM_FIELDS, dtype=torch.int32, device=lists.device)
    overlaps: Any = _overlaps(lists.device)
    is_sorted: Any = lists.has_length and lists.b <= _MAX_SORTED
    _whole_items_kernel[(triton.cdiv(lists.b, _STEP.value),)](
        items, lists.length, lists.extra_length, items.stride(0), lists.b, lists.s_q, lists.topk,
        lists.extra_topk, lists.queries, num_programs,
        IS_SORTED=is_sorted, BLOCK_G=triton.next_power_of_2(num_programs),
        OVERLAPS=overlaps,
        **launch_options(_WHOLE_WARPS, 1),
    )  # fmt: skip
    return items


@dataclass(frozen=True, slots=True)
class Split:
    """What `split_items` makes, and what the merge needs.

    items: as above. bounds [num_programs + 1] and spans [rows, 2] int32 say in pairs where the
    programs' parts and the split rows begin and end; the rows are those behind `first_row`.
    """

    items: Tensor
    bounds: Tensor
    spans: Tensor
    first_row: int


def split_items(lists: Lists, num_programs: int, rounds: int) -> Split:
    """Whole rows for each program first, then equal parts; lengths must be known if rounds > 0."""
    first_row = rounds * num_programs
    num_rows = lists.rows - first_row
    entries = rounds + num_rows + 2
    sizes = {"dtype": torch.int32, "device": lists.device}
    items = torch.empty(num_programs, entries, ITEM_FIELDS, **sizes)
    bounds = torch.empty(num_programs + 1, **sizes)
    spans = torch.empty(num_rows, 2, **sizes)
    overlaps: Any = _overlaps(lists.device)
    _split_items_kernel[(num_programs,)](
        items, bounds, spans, lists.length, lists.extra_length, items.stride(0), lists.b,
        lists.s_q, lists.topk, lists.extra_topk, num_programs, rounds,
        BLOCK_R=triton.next_power_of_2(num_rows), OVERLAPS=overlaps,
        **launch_options(_SPLIT_WARPS, 1),
    )  # fmt: skip
    return Split(items, bounds, spans, first_row)
