"""The lightning indexer, both backends, against a loop in fp64."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from backend_option import BACKENDS, TESTED
from lightning_cases import assert_right, make_call
from sparse_decode_cases import DEVICE

from model1.errors import BackendUnavailable
from model1.ops.selector import lightning_topk
from model1.ops.selector.lightning import LIGHTNING_TOPK

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


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


def _single_queries() -> dict[str, Any]:
    """Three requests of one query; of the models' widths on a GPU."""
    sizes = (64, 128, 5000, 64, 512) if DEVICE == "cuda" else (2, 16, 20, 4, 5)
    return make_call((1, 1, 1), *sizes)


@pytest.mark.triton
def test_queries_may_be_strided() -> None:
    call = _single_queries()
    want = lightning_topk(**call, backend="triton")
    t, h, d = call["q"].shape
    wide = torch.full((t, h + 1, d + 16), 0x7F, dtype=torch.uint8, device=DEVICE)
    wide[:, :h, :d] = call["q"].view(torch.uint8)
    call["q"] = wide.view(torch.float8_e4m3fn)[:, :h, :d]
    assert torch.equal(lightning_topk(**call, backend="triton"), want)


@pytest.mark.triton
def test_rows_do_not_know_order_and_number_of_their_mates() -> None:
    call = _single_queries()
    want = lightning_topk(**call, backend="triton")
    for order in ([2, 0, 1], [1]):
        rows = {name: call[name][order] for name in ("q", "weights", "block_table", "key_end")}
        rows["cu_seqlens_q"] = call["cu_seqlens_q"][: len(order) + 1]
        assert torch.equal(lightning_topk(**(call | rows), backend="triton"), want[order])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("h", [3, 17, 32, 128])
def test_deterministic_rows_do_not_know_their_mates(h: int, backend: str) -> None:
    """A mate with many queries, which changes the sizes of a launch, no mate, a wider table."""
    big = DEVICE == "cuda"
    sizes = (128, 5000, 64, 512) if big else (16, 40, 4, 30)
    call = make_call((1, 1, 70 if big else 5), min(h, 128 if big else 17), *sizes)
    call |= {"deterministic": True, "backend": backend}
    want = lightning_topk(**call)
    assert_right(want, call)
    for order in ([1, 0], [1]):
        rows = {name: call[name][order] for name in ("q", "weights", "block_table", "key_end")}
        table = rows["block_table"]
        wide = {
            "block_table": torch.cat([table, table], 1),
            "cu_seqlens_q": call["cu_seqlens_q"][: len(order) + 1],
            "max_seqlen_q": 1,
            "max_seqlen": 2 * call["max_seqlen"],
        }
        assert torch.equal(lightning_topk(**(call | rows | wide)), want[order])


@pytest.mark.triton
def test_deterministic_single_queries_get_the_sizes_of_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from model1.ops.selector import portable_lightning

    singles, choose = [], portable_lightning.choose_config

    def chosen(h: int, *, is_single: bool) -> Any:
        singles.append(is_single)
        return choose(h, is_single=is_single)

    monkeypatch.setattr(portable_lightning, "choose_config", chosen)
    for deterministic in (False, True):
        call = make_call((1,), 2, 16, 9, 4, topk=3)
        lightning_topk(**call, deterministic=deterministic, backend="triton")
    assert singles == [True, False]


@pytest.mark.gpu
def test_keys_beyond_two_gibibytes() -> None:
    near = make_call((1, 3), 64, 128, 300, 64, topk=40)
    want = lightning_topk(**near, backend="triton")
    num_blocks, num_near = 2**31 // (64 * 128) + 20, len(near["index_cache"]) // 64
    far = dict(near)
    far["index_cache"] = torch.full((64 * num_blocks, 128), 0x7F, dtype=torch.uint8, device="cuda")
    far["index_scale"] = torch.full((64 * num_blocks,), math.nan, device="cuda")
    for name in ("index_cache", "index_scale"):
        far[name][-64 * num_near :] = near[name]
    table = near["block_table"]
    far["block_table"] = torch.where(table >= 0, table + (num_blocks - num_near), table)
    assert torch.equal(lightning_topk(**far, backend="triton"), want)


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
        lightning_topk(**(make_call((1,), 2, 16, 30, 4, 8) | change), backend=TESTED)


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
        (*(call[name] for name in names), LIGHTNING_TOPK.resolve(backend, call["q"].device)),
        test_utils=("test_faketensor",),  # the others compute with float8 tensors
    )
