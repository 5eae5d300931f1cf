"""Prefix sums: what is refused, and when nobody looks."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from model1.ops.ragged import check_prefix_sums, is_readable


@pytest.mark.parametrize(
    ("ends", "max_seqlen", "owns_all", "message"),
    [
        ([0, 2, 3], 2, True, None),
        ([0, 2, 2], 2, False, None),
        ([0], 1, False, None),
        ([0, 2, 2], 2, True, r"cu_seqlens_k must not fall and go from 0 to 3, got \[0, 2, 2\]"),
        ([0, 2, 4], 2, False, r"must not fall and go from 0 to at most 3, got \[0, 2, 4\]"),
        ([1, 2, 3], 2, True, "must not fall"),
        ([0, 2, 1, 3], 3, True, "must not fall"),
        ([0, 2**31 - 1, -(2**31), 3], 3, True, "must not fall"),  # a difference beyond 32 bits
        ([0, 0, 3], 2, True, "max_seqlen_k is 2, but a request has 3 tokens"),
    ],
)
def test_only_rising_sums_within_the_rows(
    ends: list[int], max_seqlen: int, owns_all: bool, message: str | None
) -> None:
    arguments = ("k", torch.tensor(ends, dtype=torch.int32), max_seqlen, 3)
    if message is None:
        check_prefix_sums(*arguments, owns_all=owns_all)
    else:
        with pytest.raises(ValueError, match=message):
            check_prefix_sums(*arguments, owns_all=owns_all)


def test_nobody_looks_at_numbers_that_are_not_there() -> None:
    wrong = torch.tensor([5, 0], dtype=torch.int32)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(wrong)
    for tensor in (fake, wrong.to("meta")):
        assert not is_readable(tensor)
        check_prefix_sums("q", tensor, 1, 1, owns_all=True)

    def traced(x: torch.Tensor) -> torch.Tensor:
        check_prefix_sums("q", x, 1, 1, owns_all=True)
        return x + 1

    assert torch.equal(torch.compile(traced, fullgraph=True, backend="eager")(wrong), wrong + 1)
