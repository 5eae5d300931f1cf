"""The Triton selector, remainder and their composite against double precision."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lowrank_cases import (
    CHOICE,
    Kind,
    Shape,
    assert_good_choice,
    attention_expected,
    draw_shape,
    every_key,
    make_arguments,
    rest_expected,
    scan_arguments,
    store_projections,
)
from sparse_decode_cases import DEVICE, store
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.selector import lowrank_topk
from model1.ops.selector.ref import request_slots
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.lowrank_remainder.portable import lowrank_remainder_triton
from model1.ops.selector import portable_sizes
from model1.ops.selector.portable import lowrank_topk_triton
from model1.ops.selector.portable_sizes import Config, choose_num_splits

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

SMALL = KVLayout("model1_fp8", 64, 32)
BF16, MODEL1 = KVLayout("bf16", 192, 32), KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
TINY = [
    (SMALL, 1, 16, 4), (KVLayout("v32_fp8", 128, 16), 17, 64, 7),
    (KVLayout("bf16", 48, 16), 3, 16, 1), (KVLayout("fp32", 80, 16), 3, 64, 16),
]  # fmt: skip
MODELS = [
    (MODEL1, 64, 64, 64), (MODEL1, 128, 64, 1), (V32, 16, 64, 53), (V32, 128, 16, 64),
    (BF16, 6, 16, 16), (BF16, 1, 64, 53), (SMALL, 64, 16, 64),
]  # fmt: skip


def check(arguments: dict[str, Any], config: Config | None = None, **options: Any) -> None:
    """All three operators on one call."""
    scan = scan_arguments(arguments)
    if config is None:
        chosen, lse = lowrank_topk(**scan, **options, backend="triton")
    else:
        chosen, lse = lowrank_topk_triton(**scan, deterministic=False, config=config)
    assert_good_choice(chosen, lse, scan)
    rotary = arguments["rotary_value"]
    rest = remainder_arguments(arguments, chosen)
    if config is None:
        out, lse = lowrank_remainder(**rest, **options, backend="triton")
    else:
        out, lse = lowrank_remainder_triton(**rest, deterministic=False, config=config)
    want, baseline, want_lse, noise = rest_expected(scan, chosen, rotary)
    assert out.dtype == scan["scan_q"].dtype
    assert_close_rows(out, baseline, want, noise=noise)
    assert_close_rows(lse[..., None], want_lse[..., None], want_lse[..., None])
    if config is None:
        check_composite(arguments, chosen, **options)


def check_composite(arguments: dict[str, Any], chosen: Tensor, **options: Any) -> None:
    out, lse = lowrank_attention(**arguments, **options, backend="triton")
    want, want_lse, _ = attention_expected(arguments, chosen, is_baseline=False)
    baseline, base_lse, noise = attention_expected(arguments, chosen, is_baseline=True)
    assert out.dtype == arguments["q"].dtype
    assert_close_rows(out, baseline, want, noise=noise)
    assert_close_rows(lse[..., None], base_lse[..., None], want_lse[..., None])
    assert not out[arguments["key_end"] <= 0].any()


def remainder_arguments(arguments: dict[str, Any], core: Tensor) -> dict[str, Any]:
    scan = scan_arguments(arguments)
    rest = {name: x for name, x in scan.items() if name not in CHOICE}
    return rest | {"core_indices": core, "rotary_value": arguments["rotary_value"]}


def check_random_case(number: int, kinds: list[Kind], *, is_large: bool) -> None:
    shape = draw_shape(number, kinds, is_large=is_large)
    try:
        check(make_arguments(shape))
    except AssertionError as error:
        raise AssertionError(f"case {number}, {shape}: {error}") from None


@pytest.mark.parametrize("number", range(5))
def test_random_calls_are_right(number: int) -> None:
    check_random_case(number, TINY, is_large=False)


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(1000, 1600, 25))
def test_random_calls_of_the_models_widths_are_right(first: int) -> None:
    for number in range(first, first + 25):
        check_random_case(number, MODELS, is_large=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", [MODEL1, KVLayout("fp32", 192, 32)])
def test_other_types_of_query(layout: KVLayout, dtype: torch.dtype) -> None:
    check(make_arguments(Shape(layout=layout, h=24, max_seqlen=300), dtype=dtype))


@pytest.mark.parametrize(("h", "block_size"), [(1, 53), (5, 64), (65, 1)])
def test_any_number_of_heads_and_any_block_size(h: int, block_size: int) -> None:
    shape = Shape(layout=SMALL, h=h, block_size=block_size, query_lens=(1,), max_seqlen=9)
    check(make_arguments(shape))


@pytest.mark.parametrize("r", [1, 144])
def test_any_rank(r: int) -> None:
    shape = Shape(layout=KVLayout("bf16", 144, 16), r=r, query_lens=(1,), max_seqlen=20)
    check(make_arguments(shape))


def test_cutting_the_work_otherwise_gives_the_same() -> None:
    arguments = make_arguments(Shape(layout=SMALL, query_lens=(2,), max_seqlen=60, h=4))
    for block_m, block_n, num_splits in [(16, 32, 3), (64, 16, 7)]:
        check(
            arguments,
            Config(
                block_m=block_m, block_n=block_n, num_warps=4, num_stages=1, num_splits=num_splits
            ),
        )


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(Shape(layout=SMALL, query_lens=(1, 2), has_sink=True))
    want = lowrank_attention(**arguments, backend="triton")
    monkeypatch.setattr(portable_sizes, "WORKSPACE_BYTES", 2000)
    got = lowrank_attention(**arguments, backend="triton")
    for one, other in zip(got, want, strict=True):  # fewer rows at a time may be split otherwise
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_no_rows_no_requests_and_no_keys() -> None:
    arguments = make_arguments(Shape(layout=SMALL, query_lens=(0, 0)))
    out, lse = lowrank_attention(**arguments, backend="triton")
    assert [*out.shape, *lse.shape] == [0, 3, 96, 0, 3]
    arguments = make_arguments(Shape(layout=SMALL, query_lens=(2, 2)))
    arguments["key_end"].zero_()
    for max_seqlen in (40, 0):
        out, lse = lowrank_attention(
            **(arguments | {"max_seqlen": max_seqlen}), backend="triton", deterministic=True
        )
        assert not out.any()
        assert lse.isneginf().all()


def test_a_full_core_is_dense_attention() -> None:
    shape = Shape(layout=SMALL, topk=40, window=0, query_lens=(1, 1))
    arguments = make_arguments(shape)
    arguments["core_count"].fill_(40)
    arguments["index_cache"].normal_(0, 5)  # what the scan says no longer matters
    chosen, _ = lowrank_topk(**scan_arguments(arguments), backend="triton")
    for row, end in enumerate(arguments["key_end"].tolist()):
        assert chosen[row].tolist() == [*range(end), *[-1] * (40 - end)]
    check_composite(arguments, chosen)


def test_full_rank_is_dense_attention() -> None:
    layout = KVLayout("fp32", 48, 16)
    shape = Shape(layout=layout, r=48, query_lens=(1, 1), topk=5, window=2)
    arguments = make_arguments(shape, dtype=torch.float32)
    store_projections(arguments)
    dense, dense_lse, _ = attention_expected(arguments, every_key(arguments), is_baseline=False)
    out, lse = lowrank_attention(**arguments, backend="triton")
    assert_close_rows(out, dense, dense, eps=1e-4)
    assert_close_rows(lse[..., None], dense_lse[..., None], dense_lse[..., None], eps=1e-4)


def test_later_tokens_change_no_bit_of_earlier_rows() -> None:
    shape = Shape(layout=SMALL, query_lens=(2,), max_seqlen=40)
    arguments = make_arguments(shape)
    arguments["key_end"].copy_(torch.tensor([30, 37]))
    slots = torch.arange(len(arguments["index_cache"]), device=DEVICE)
    store(arguments["kv_cache"], slots, SMALL, 4)
    arguments["index_cache"].normal_()
    arguments["block_table"].copy_(torch.randperm(len(arguments["kv_cache"]))[None, :10])
    want = lowrank_attention(**arguments, backend="triton")
    late = request_slots(arguments["block_table"], 0, 40, 4)[30:]
    store(arguments["kv_cache"], late, SMALL, 4)
    arguments["index_cache"][late] = 3.0
    got = lowrank_attention(**arguments, backend="triton")
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[0], b[0])
        assert not torch.equal(a[1], b[1])


def test_deterministic_rows_do_not_depend_on_their_batch_mates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":  # where tiles are narrow and slow
        config = Config(
            block_m=16, block_n=16, num_warps=4, num_stages=1, deterministic_split_keys=16
        )
        monkeypatch.setattr(
            "model1.ops.selector.portable_scan.choose_config", lambda *_, **__: config
        )
    max_seqlen = 40 if DEVICE == "cpu" else 5000
    shape = Shape(layout=SMALL, query_lens=(1, 1, 2), max_seqlen=max_seqlen, has_sink=True)
    arguments = make_arguments(shape)
    want = lowrank_attention(**arguments, deterministic=True, backend="triton")
    for order in ([2], [1]):
        got = lowrank_attention(**pick(arguments, order), deterministic=True, backend="triton")
        first = arguments["cu_seqlens_q"].tolist()
        rows = [row for i in order for row in range(first[i], first[i + 1])]
        for a, b in zip(got, want, strict=True):
            # a row's place in a tile changes its last bits in NumPy's products, not on a GPU
            atol = 0.0 if DEVICE == "cuda" else 1e-6
            assert torch.allclose(a, b[rows], rtol=0.0, atol=atol)


def pick(arguments: dict[str, Any], requests: list[int]) -> dict[str, Any]:
    first = arguments["cu_seqlens_q"].tolist()
    rows = [row for i in requests for row in range(first[i], first[i + 1])]
    lens = [first[i + 1] - first[i] for i in requests]
    return arguments | {
        "q": arguments["q"][rows], "block_table": arguments["block_table"][requests],
        "key_end": arguments["key_end"][rows], "core_count": arguments["core_count"][rows],
        "cu_seqlens_q": torch.tensor([0, *lens], device=DEVICE).cumsum(0).int(),
        "max_seqlen_q": max(lens),
    }  # fmt: skip


def test_core_indices_that_are_no_position_are_ignored() -> None:
    shape = Shape(layout=SMALL, query_lens=(1, 1), max_seqlen=20)
    core = torch.tensor([[3, -1, -1, -1], [-1, 5, -1, 0]], dtype=torch.int32, device=DEVICE)
    wrong = torch.tensor([2**31 - 1, -(2**31), 20, 21], dtype=torch.int32, device=DEVICE)
    arguments = make_arguments(shape)
    for backend in ("ref", "triton"):
        want = lowrank_remainder(**remainder_arguments(arguments, core), backend=backend)
        hostile = torch.where(core < 0, wrong, core)
        got = lowrank_remainder(**remainder_arguments(arguments, hostile), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_seen_nan_comes_out_of_the_rows_that_see_it() -> None:
    arguments = make_arguments(Shape(layout=SMALL, query_lens=(1, 1), max_seqlen=20))
    arguments["key_end"].fill_(11)
    arguments["block_table"].copy_(torch.arange(10, device=DEVICE).view(2, 5))
    slots = torch.arange(40, device=DEVICE)
    store(arguments["kv_cache"], slots, SMALL, 4)
    arguments["index_cache"][:40].normal_()
    # NaN votes come out as the first or as the last, by its sign, which is the processor's choice:
    # of key 5 neither makes one of the core
    arguments["core_count"].fill_(3)
    want = lowrank_attention(**arguments, backend="triton")
    arguments["index_cache"][20 + 5, 5] = math.nan
    got = lowrank_attention(**arguments, backend="triton")
    assert got[0][1, :, :64].isnan().all()
    assert all(torch.equal(a[0], b[0]) for a, b in zip(got, want, strict=True))


def moved_far(arguments: dict[str, Any], num_blocks: int) -> dict[str, Any]:
    """The same call with its blocks at the end of caches of that many blocks, NaN elsewhere."""
    layout, size = arguments["layout"], arguments["block_size"]
    near, index = arguments["kv_cache"], arguments["index_cache"]
    cache = allocate_kv_cache(num_blocks, size, layout, DEVICE).fill_(0xFF)
    cache[-len(near) :, : near.shape[1]] = near
    far_index = index.new_full((num_blocks * size, index.shape[1]), math.nan)
    far_index[-len(index) :] = index
    table = arguments["block_table"]
    is_block = (table >= 0) & (table < len(near))
    table = torch.where(is_block, table + (num_blocks - len(near)), table)
    return arguments | {"kv_cache": cache, "index_cache": far_index, "block_table": table}


@pytest.mark.gpu
def test_slots_beyond_two_gibi_elements() -> None:
    # 2^31 numbers of rank 64, and more of the tokens' rows
    near = make_arguments(
        Shape(layout=SMALL, query_lens=(1, 3), max_seqlen=300, h=16, r=64, block_size=64, topk=40)
    )
    far = moved_far(near, 2**31 // (64 * 64) + 20)
    results = []
    for arguments in (near, far):
        core, lse = lowrank_topk(**scan_arguments(arguments), backend="triton")
        rest = lowrank_remainder(**remainder_arguments(arguments, core), backend="triton")
        whole = lowrank_attention(**arguments, backend="triton")
        results.append([core, lse, *rest, *whole])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


def test_more_heads_than_a_program_holds_are_refused() -> None:
    arguments = make_arguments(Shape(layout=SMALL, h=129, query_lens=(1,)))
    with pytest.raises(BackendUnavailable, match="128 heads, got 129"):
        lowrank_attention(**arguments, backend="triton")


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert choose_num_splits(1, 65536, 264) == 256
    assert choose_num_splits(16, 65536, 264) == 16
    assert choose_num_splits(264, 65536, 264) == 1
    assert choose_num_splits(1, 1, 264) == 1
