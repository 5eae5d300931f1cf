"""The choice of the largest scores in Triton, exactly: against a stable sort."""

from __future__ import annotations

import math

import pytest
import torch
from sparse_decode_cases import DEVICE
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.selector.portable_select import Choice

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def expected(scores: Tensor, key_end: Tensor, count: Tensor, topk: int) -> Tensor:
    """Ascending columns of the largest, the lower ones among equals, -1 behind."""
    chosen = torch.full((len(scores), topk), -1, dtype=torch.int32)
    for row, end in enumerate(key_end.tolist()):
        num = max(0, min(int(count[row]), end, topk))
        visible = torch.where(scores[row, :end].isnan(), math.inf, scores[row, :end])
        chosen[row, :num] = visible.sort(descending=True, stable=True).indices[:num].sort().values
    return chosen


def check(scores: Tensor, key_end: list[int], count: list[int], topk: int) -> None:
    rows, width = scores.shape
    choice = Choice.empty(rows, width, torch.device(DEVICE))
    choice.state.zero_()
    choice.scores[:, :width] = scores.to(DEVICE)
    end, num = (torch.tensor(x, dtype=torch.int32) for x in (key_end, count))
    got = torch.empty(rows, topk, dtype=torch.int32, device=DEVICE)
    choice.store_largest(end.to(DEVICE), num.to(DEVICE), width, got)
    assert torch.equal(got.cpu(), expected(scores, end, num, topk))


def hostile_scores(rows: int, width: int, seed: int) -> Tensor:
    """One kind of numbers a row: usual, few values, tiny, negative, huge, with inf."""
    torch.manual_seed(seed)
    scores = torch.randn(rows, width)
    scores[1::6] = scores[1::6].round()
    scores[2::6] *= 1e-30
    scores[3::6] = -scores[3::6].abs() * 1e-3
    scores[4::6] *= 1e30
    scores[5::6, ::7] = math.inf
    scores[5::6, 1::7] = -math.inf
    return scores


@pytest.mark.parametrize("rows", [6, 13])
def test_every_kind_of_score(rows: int) -> None:
    scores = hostile_scores(rows, 1501, rows)
    key_end = [1501, 1490, 513, 1024, 1501, 1500, 1501, 0, 1, 700, 37, -3, 1501][:rows]
    count = [300, 700, 512, 300, 1, 400, 0, 5, 5, 600, 64, 5, 1501][:rows]
    check(scores, key_end, count, 700)


def test_more_equal_scores_than_are_looked_at_together() -> None:
    scores = torch.zeros(2, 2600)
    scores[0, ::5] = 1.0
    scores[1] = 1.0 + torch.arange(2600).flip(0) % 1300 * 2.0**-23
    check(scores, [2600, 2599], [700, 1203], 1300)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 300])
def test_long_rows(rows: int) -> None:
    scores = hostile_scores(rows, 70001, rows)
    torch.manual_seed(rows)
    key_end = torch.randint(-5, 70002, (rows,)).tolist()
    count = torch.randint(0, 2049, (rows,)).tolist()
    for _ in range(3):  # the programs meet in another order each time
        check(scores, key_end, count, 2048)
