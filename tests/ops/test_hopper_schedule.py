"""The schedules of persistent programs, and the merge of what they split."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

import triton

from model1.ops.hopper.combine import _flash_fwd_mla_combine_kernel
from model1.ops.hopper.launch import merge_sizes
from model1.ops.hopper.schedule import Lists, Split, split_items, whole_items
from model1.ops.launch import launch_options

SINKS = (math.inf, -math.inf, 0.5, -3.0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def make_lists(b: int, s_q: int, topk: int, extra_topk: int, *, has_length: bool) -> Lists:
    lengths = [
        torch.randint(-2, most + 3, (b,), dtype=torch.int32).to(DEVICE) if has_length else None
        for most in (topk, extra_topk)
    ]
    return Lists(
        b=b, s_q=s_q, topk=topk, extra_topk=extra_topk, length=lengths[0],
        extra_length=lengths[1], device=DEVICE,
    )  # fmt: skip


def entries(lists: Lists) -> tuple[list[int], list[int]]:
    """How many entries of each request's lists count."""
    counts = []
    for most, length in ((lists.topk, lists.length), (lists.extra_topk, lists.extra_length)):
        counts.append([most] * lists.b if length is None else length.clamp(0, most).tolist())
    return counts[0], counts[1]


def pairs(main: int, extra: int) -> int:
    return max(1, -(-(-(-main // 64) + -(-extra // 64)) // 2))


def read_items(items: Tensor) -> list[list[list[int]]]:
    """The items of each program, without what surrounds them."""
    programs = []
    for listed in items.cpu():
        count = int(listed[0, 0])
        assert listed[count + 1, :7].tolist() == [0, 0, 0, 1 << 30, -1, 0, 0]
        programs.append(listed[1 : count + 1, :7].tolist())
    return programs


def check_cover(lists: Lists, programs: list[list[list[int]]]) -> None:
    """Every row's pairs once, with the entries of its lists."""
    main, extra = entries(lists)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for items in programs:
        for request, query, first, end, _, num_main, num_extra in items:
            assert (num_main, num_extra) == (main[request], extra[request])
            assert first % 2 == end % 2 == 0 <= first < end
            seen.setdefault((request, query), []).append((first, end))
    assert sorted(seen) == [(i, j) for i in range(lists.b) for j in range(lists.s_q)]
    for (request, _), ranges in seen.items():
        ranges.sort()
        ends = [0, *(end for _, end in ranges)]
        assert [first for first, _ in ranges] == ends[:-1]
        assert ends[-1] == 2 * pairs(main[request], extra[request])


def drawn(number: int) -> tuple[Lists, int]:
    """Lists and a number of programs, drawn from a number."""
    random.seed(number)
    torch.manual_seed(number)
    lists = make_lists(
        random.choice([1, 2, 5, 70]), random.choice([1, 2, 3]), random.choice([0, 1, 128, 700]),
        random.choice([0, 1, 64, 500]), has_length=number % 2 == 0,
    )  # fmt: skip
    return lists, random.choice([1, 2, 7, 17])


@pytest.mark.parametrize("number", range(8))
def test_whole_rows_cover_all_rows_once(number: int) -> None:
    lists, num_programs = drawn(number)
    programs = read_items(whole_items(lists, num_programs))
    check_cover(lists, programs)
    assert all(item[4] == -1 for items in programs for item in items)
    counts = [len(items) for items in programs]
    assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("number", range(12))
def test_split_rows_cover_all_rows_once(number: int) -> None:
    lists, num_programs = drawn(number)
    rounds = 0 if lists.has_length else min(number % 3, (lists.rows - 1) // num_programs)
    plan = split_items(lists, num_programs, rounds)
    programs = read_items(plan.items)
    check_cover(lists, programs)
    check_parts(lists, plan, programs)


def check_parts(lists: Lists, plan: Split, programs: list[list[list[int]]]) -> None:
    """The merge finds from bounds and spans exactly the partial results that items announce."""
    announced = {
        item[4]: (item[0] * lists.s_q + item[1]) for items in programs for item in items
        if item[4] >= 0
    }  # fmt: skip
    bounds, spans = plan.bounds.tolist(), plan.spans.tolist()
    found = {}
    for index, (start, end) in enumerate(spans):
        parts = [
            2 * c + (start >= bounds[c])
            for c in range(len(programs))
            if bounds[c + 1] > start and bounds[c] < end and bounds[c + 1] > bounds[c]
        ]
        if len(parts) > 1:
            found |= dict.fromkeys(parts, plan.first_row + index)
    assert found == announced


def test_long_requests_first_even_out() -> None:
    torch.manual_seed(3)
    lists = make_lists(256, 2, 128, 1024, has_length=True)
    loads = [sum(i[3] - i[2] for i in items) for items in read_items(whole_items(lists, 132))]
    assert max(loads) <= 1.1 * sum(loads) / len(loads)


@pytest.mark.parametrize("has_many", [False, True])
@pytest.mark.parametrize(("number", "h"), [(1, 3), (4, 65), (6, 3), (9, 2)])
def test_parts_are_weighted_by_their_sums(number: int, h: int, has_many: bool) -> None:
    check_merge(number, *drawn(number), h, has_many)


@pytest.mark.parametrize("has_many", [False, True])
def test_more_parts_of_a_row_than_a_step_takes(has_many: bool) -> None:
    # 70 programs share two rows: 35 parts each, in steps of 8 or 32
    lists = make_lists(2, 1, 9000, 0, has_length=False)
    check_merge(0, lists, 70, 2, has_many)


def check_merge(number: int, lists: Lists, num_programs: int, h: int, has_many: bool) -> None:
    """Random partial results, merged in the kernel's way, against a sum in double precision."""
    plan = split_items(lists, num_programs, 0)
    device, groups = lists.device, -(-h // 64)
    torch.manual_seed(number)
    partial = torch.randn(2 * num_programs, groups, 64, 512, device=device)
    log2_sum = 3 * torch.randn(2 * num_programs, groups, 64, device=device)
    log2_sum[torch.rand_like(log2_sum) < 0.2] = -math.inf  # a part without keys
    sink = torch.tensor([SINKS[i % 4] for i in range(h)], device=device)
    untouched = -7.0
    out = torch.full((lists.rows, h, 512), untouched, device=device)
    lse = torch.full((lists.rows, h), untouched, device=device)
    sizes = merge_sizes(has_many)
    _flash_fwd_mla_combine_kernel[(lists.rows * h * 512 // sizes["BLOCK_C"],)](
        out, lse, partial, log2_sum, sink, plan.bounds, plan.spans, 0, h, groups, num_programs,
        math.inf, BLOCK_G=triton.next_power_of_2(num_programs), OVERLAPS=False, **sizes,
        **launch_options(4, 1),
    )  # fmt: skip
    slots: dict[int, list[int]] = {}
    for listed in plan.items.tolist():
        for request, query, _, _, slot, *_ in listed[1 : listed[0][0] + 1]:
            if slot >= 0:
                slots.setdefault(request * lists.s_q + query, []).append(slot)
    for row in range(lists.rows):
        if row not in slots:
            assert (out[row] == untouched).all()
            continue
        parts = log2_sum[slots[row]].flatten(1)[:, :h].double() * math.log(2)  # [parts, h]
        values = partial[slots[row]].flatten(1, 2)[:, :h].double()
        want = parts.logsumexp(0)
        total = torch.logaddexp(want, sink.double())
        weights = torch.exp(parts - total.masked_fill(total == -math.inf, 0.0))
        is_empty = want == -math.inf
        want_out = torch.einsum("ph,phc->hc", weights, values)
        torch.testing.assert_close(out[row].double(), want_out, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            lse[row].double(), want.masked_fill(is_empty, math.inf), atol=2e-5, rtol=2e-5
        )
