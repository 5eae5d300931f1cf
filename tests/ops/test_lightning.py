"""The lightning indexer, both backends, against a loop in fp64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from lightning_cases import assert_right, make_call

from model1.errors import BackendUnavailable
from model1.ops.selector import lightning_topk

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
BACKENDS = ["ref", pytest.param("triton", marks=pytest.mark.triton)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", range(3))
def test_random_calls_are_right(number: int, backend: str) -> None:
    torch.manual_seed(number)
    h, d = [(1, 16), (3, 24), (17, 128)][number]
    call = make_call([(1, 0, 1), (2,), (1,)][number], h, d, 40, [1, 7, 16][number], topk=9)
    assert_right(lightning_topk(**call, backend=backend), call)


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(0, 500, 20))
def test_random_calls_of_the_models_widths_are_right(first: int) -> None:
    for number in range(first, first + 20):
        random.seed(number)
        torch.manual_seed(number)
        lens = random.choice([(1,), (1, 1, 1), (0, 33), (5, 1)])
        max_seqlen, block_size = random.choice([100, 5000]), random.choice([1, 53, 64])
        call = make_call(lens, random.choice([17, 32, 64]), 128, max_seqlen, block_size, topk=512)
        try:
            assert_right(lightning_topk(**call, backend="triton"), call)
        except AssertionError as error:
            raise AssertionError(f"case {number}: {error}") from None


@pytest.mark.triton
def test_equal_scores_go_to_the_lower_positions() -> None:
    call = make_call((1,), 2, 16, 30, 4, topk=8)
    call["key_end"].fill_(30)
    call["block_table"].copy_(torch.arange(8)[None])
    call["index_cache"].zero_()
    call["index_scale"].fill_(1.0)
    call["index_cache"][20] = call["q"][0, 0].view(torch.uint8)
    call["weights"].fill_(1.0)
    got = lightning_topk(**call, backend="triton")
    assert got[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 20]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 16)}, r"q must be \[t, h, d\] float8_e4m3fn"),
        ({"weights": torch.zeros(1, 3)}, r"weights must be contiguous \[1, 2\]"),
        ({"index_scale": torch.zeros(3)}, r"index_scale must be contiguous \[36\]"),
        ({"topk": 0}, "topk must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lightning_topk(**(make_call((1,), 2, 16, 30, 4, 8) | change), backend="ref")


@pytest.mark.triton
def test_more_heads_than_a_program_holds_are_refused() -> None:
    with pytest.raises(BackendUnavailable, match="128 heads, got 129"):
        lightning_topk(**make_call((1,), 129, 16, 30, 4, 8), backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    call = make_call((1,), 1, 16, 5, 4, topk=2)
    call["index_cache"].zero_()
    call["index_scale"].zero_()
    names = (
        "q", "weights", "index_cache", "index_scale", "block_table", "cu_seqlens_q",
        "max_seqlen_q", "key_end", "topk", "max_seqlen", "block_size",
    )  # fmt: skip
    torch.library.opcheck(
        torch.ops.model1.lightning_topk,
        (*(call[name] for name in names), backend),
        test_utils=("test_faketensor",),  # the others compute with float8 tensors
    )
