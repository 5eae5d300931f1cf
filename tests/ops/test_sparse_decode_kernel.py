"""The Triton kernels of sparse decode against double precision, interpreted or on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_decode_cases import (
    DEVICE,
    DTYPE,
    Shape,
    assert_right,
    check_random_case,
    make_arguments,
    pick,
    run,
    store,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout, allocate_kv_cache
from model1.ops.sparse_decode import sparse_decode

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.compile_cases import KernelTarget
from model1.ops.launch import fast_divisor
from model1.ops.sparse_decode import portable
from model1.ops.sparse_decode.portable import (
    Config,
    choose_config,
    choose_split_tiles,
    sparse_decode_triton,
)

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
SMALL = KVLayout("model1_fp8", 64, 32)
# Between them: every layout, pieces of 128, 64, 32 and 16 channels, rows without rotary channels.
LAYOUTS = [
    SMALL,
    KVLayout("model1_fp8", 192, 64),
    KVLayout("v32_fp8", 128, 32),
    KVLayout("v32_fp8", 256, 0),
    KVLayout("bf16", 48, 16),
    KVLayout("fp32", 80, 0),
]


@pytest.mark.parametrize("number", range(14))
def test_random_calls_are_right(number: int) -> None:
    check_random_case(number, LAYOUTS, heads=[1, 3, 9, 17], topks=[1, 15, 16, 40], bs=[1, 2])


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(1000, 1600, 20))
def test_random_calls_of_the_models_widths_are_right(first: int) -> None:
    heads = [1, 3, 8, 16, 17, 32, 63, 64, 126, 128]
    topks = [1, 63, 64, 65, 128, 200, 576, 2048]
    for number in range(first, first + 20):
        check_random_case(number, [MODEL1, V32, SMALL], heads, topks, bs=[1, 2, 5, 16])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "layout", [MODEL1, V32, KVLayout("bf16", 448, 64), KVLayout("fp32", 64, 0)]
)
def test_other_types_of_query(layout: KVLayout, dtype: torch.dtype) -> None:
    for h in (5, 24, 128):
        shape = Shape(layout=layout, h=h, topk=150, extra_topk=70, has_length=True, has_sink=True)
        arguments = make_arguments(shape, dtype=dtype)
        assert_right(run(arguments), arguments)


@pytest.mark.parametrize("h", [1, 3, 9, 63, 126, 129])
def test_any_number_of_heads(h: int) -> None:
    arguments = make_arguments(Shape(layout=SMALL, b=1, h=h, topk=5, has_sink=True))
    assert_right(run(arguments), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [MODEL1, V32], ids=lambda x: x.name)
def test_every_number_of_heads(layout: KVLayout) -> None:
    for h in range(1, 131):
        shape = Shape(layout=layout, b=2, h=h, topk=70, block_size=64, has_sink=True)
        arguments = make_arguments(shape)
        assert_right(run(arguments), arguments)


@pytest.mark.parametrize("block_size", [1, 2, 53, 61, 64, 256])
def test_any_block_size(block_size: int) -> None:
    shape = Shape(layout=SMALL, b=1, topk=70, block_size=block_size, extra_topk=30)
    shape = replace(shape, extra_block_size=257 - block_size)
    arguments = make_arguments(shape)
    assert_right(run(arguments), arguments)


@pytest.mark.parametrize("value_dim", [1, 40, 64, 65, 96])
def test_any_value_width(value_dim: int) -> None:
    # a row of one bf16 channel has no error to compare with
    arguments = make_arguments(Shape(layout=SMALL, h=2, value_dim=value_dim), dtype=torch.float32)
    for split_tiles in (None, 1):
        assert_right(run(arguments, split_tiles), arguments)


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf, 7.0])
@pytest.mark.parametrize("split_tiles", [None, 1])
def test_rows_without_keys_give_zero_and_the_empty_lse(
    empty_lse: float, split_tiles: int | None
) -> None:
    arguments = make_arguments(Shape(layout=SMALL, b=3, h=2, extra_topk=20, has_sink=True))
    arguments["empty_lse"] = empty_lse
    arguments["topk_indices"][:2] = -1
    arguments["extra_topk_indices"][1:] = -1
    out, lse = run(arguments, split_tiles)
    assert_right((out, lse), arguments)
    assert (lse[1] == empty_lse).all()
    assert not out[1].any()


@pytest.mark.parametrize("split_tiles", [None, 1])
def test_lengths_of_zero_and_none_and_negative_ones(split_tiles: int | None) -> None:
    arguments = make_arguments(Shape(layout=SMALL, b=4, topk=35, extra_topk=20, has_length=True))
    arguments["topk_length"] = torch.tensor([0, 35, 0, -5], dtype=torch.int32, device=DEVICE)
    arguments["extra_topk_length"] = torch.tensor([0, 0, 20, 0], dtype=torch.int32, device=DEVICE)
    arguments["topk_indices"].fill_(-1)
    arguments["topk_indices"][1, 0, ::3] = 5
    arguments["extra_topk_indices"].fill_(-1)
    arguments["extra_topk_indices"][2, 0, 7:] = 9
    for prefix in ("", "extra_"):
        block_size = arguments[f"{prefix}block_size"]
        store(arguments[f"{prefix}kv_cache"], torch.tensor([5, 9]), SMALL, block_size)
    out, lse = run(arguments, split_tiles)
    assert_right((out, lse), arguments)
    assert lse.isposinf().flatten(1).all(1).tolist() == [True, False, False, True]


def test_no_keys_and_no_requests() -> None:
    arguments = make_arguments(Shape(layout=SMALL, b=2, topk=4))
    arguments["topk_indices"] = arguments["topk_indices"][..., :0]
    out, lse = run(arguments)
    assert not out.any()
    assert lse.isposinf().all()
    arguments |= {name: arguments[name][:0] for name in ("q", "topk_indices")}
    assert [list(x.shape) for x in run(arguments)] == [[0, 1, 3, 96], [0, 1, 3]]


@pytest.mark.parametrize("layout", LAYOUTS[1:5], ids=lambda x: f"{x.name}-{x.d_nope}")
def test_a_selected_nan_comes_out_in_its_row_only(layout: KVLayout) -> None:
    arguments = make_arguments(Shape(layout=layout, h=1, s_q=2, topk=20))
    want, want_lse = run(arguments, 1)
    unused = set(range(43)) - set(arguments["topk_indices"].flatten().tolist())
    arguments["topk_indices"][1, 0, 17] = unused.pop()
    out, lse = run(arguments, 1)
    is_nan = torch.tensor([[False, False], [True, False]])
    assert out[is_nan].isnan().all()
    assert lse[is_nan].isnan().all()
    assert torch.equal(out[~is_nan], want[~is_nan])
    assert torch.equal(lse[~is_nan], want_lse[~is_nan])


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_code_with_a_good_scale_is_nan(code: int) -> None:
    for layout in (SMALL, KVLayout("v32_fp8", 128, 32)):
        arguments = make_arguments(Shape(layout=layout, b=1, topk=3, block_size=9))
        arguments["topk_indices"][0, 0] = torch.tensor([-1, 2, 4])
        store(arguments["kv_cache"], torch.tensor([2, 4]), layout, 9)
        arguments["kv_cache"][0, 2 * layout.row_bytes + 5] = code
        out, lse = run(arguments)
        assert out.isnan().all()
        assert lse.isnan().all()


def test_the_order_of_a_list_matters_within_the_rule_only() -> None:
    arguments = make_arguments(Shape(layout=SMALL, topk=50, has_sink=True))
    assert_right(run(arguments), arguments)
    order = torch.randperm(50, device=DEVICE)
    arguments["topk_indices"] = arguments["topk_indices"][..., order]
    assert_right(run(arguments), arguments)


@pytest.mark.parametrize("split_tiles", [None, 1])
def test_permuted_requests_give_permuted_bits(split_tiles: int | None) -> None:
    shape = Shape(layout=SMALL, b=4, h=1, topk=35, extra_topk=9, has_length=True, has_sink=True)
    arguments = make_arguments(shape)
    out, lse = run(arguments, split_tiles)
    order = [3, 0, 2, 1]
    got, got_lse = run(pick(arguments, order), split_tiles)
    assert torch.equal(got, out[order])
    assert torch.equal(got_lse, lse[order])


def test_deterministic_rows_do_not_depend_on_their_batch_mates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if DEVICE == "cpu":  # where tiles are narrow and slow
        monkeypatch.setattr(portable, "_DETERMINISTIC_KEYS", 32)
    topk = 80 if DEVICE == "cpu" else 2500
    arguments = make_arguments(Shape(layout=SMALL, b=3, h=2, topk=topk, has_length=True))
    arguments["topk_length"].copy_(torch.tensor([topk, 5, topk - 10]))
    store(arguments["kv_cache"], torch.arange(2 * topk), SMALL, arguments["block_size"])
    arguments["topk_indices"].clamp_(-1, 2 * topk - 1)
    out, lse = run(arguments, deterministic=True)
    assert_right((out, lse), arguments)
    for i in range(3):
        alone, alone_lse = run(pick(arguments, [i]), deterministic=True)
        assert torch.equal(alone[0], out[i])
        assert torch.equal(alone_lse[0], lse[i])


def test_cutting_the_work_otherwise_gives_the_same() -> None:
    shape = Shape(layout=SMALL, h=20, topk=100, extra_topk=33, has_length=True, has_sink=True)
    arguments = make_arguments(shape)
    for block_h, block_n, split_tiles in [(16, 32, 2), (32, 16, 1), (16, 64, 100), (64, 16, 9)]:
        config = Config(
            block_h=block_h, block_n=block_n, num_warps=4, num_stages=1, split_tiles=split_tiles
        )
        got = sparse_decode_triton(**arguments, deterministic=False, config=config)
        assert_right(got, arguments)


def test_scores_summed_after_the_scaling_are_right() -> None:
    # what Hopper's sizes do with many heads, over rows of two pieces
    config = choose_config(KernelTarget("cuda", 90), 64, torch.bfloat16, SMALL)
    assert config.split_scores
    shape = Shape(layout=SMALL, h=3, topk=100, extra_topk=33, has_length=True, has_sink=True)
    arguments = make_arguments(shape)
    for split_tiles in (1, 9):
        cut = replace(config, split_tiles=split_tiles)
        got = sparse_decode_triton(**arguments, deterministic=False, config=cut)
        assert_right(got, arguments)


@pytest.mark.parametrize("layout", [SMALL, KVLayout("v32_fp8", 128, 0), KVLayout("bf16", 32, 0)])
def test_slots_beyond_two_gibibytes(layout: KVLayout) -> None:
    # On a CPU the pages of a zero-filled cache take no memory until they are written.
    block_size = 2
    stride = -(-(3 << 30) // layout.row_bytes) * layout.row_bytes
    cache = allocate_kv_cache(2 * stride // layout.block_stride_bytes(1), 1, layout, DEVICE)
    cache = cache.as_strided((2, layout.block_bytes(block_size)), (stride, 1))
    arguments = make_arguments(Shape(layout=layout, b=1, topk=2, block_size=block_size))
    arguments["kv_cache"] = cache
    arguments["topk_indices"][0, 0] = torch.tensor([3, 0])
    store(cache, torch.tensor([0, 3]), layout, block_size)
    assert_right(run(arguments), arguments)


@pytest.mark.parametrize("prefix", ["", "extra_"])
def test_slots_outside_their_cache_do_not_count(prefix: str) -> None:
    # the other cache has more slots, or fewer: each list has its own limit
    shape = Shape(layout=SMALL, b=2, h=1, topk=20, block_size=4, extra_topk=15)
    arguments = make_arguments(shape)
    slots, cache = arguments[f"{prefix}topk_indices"], arguments[f"{prefix}kv_cache"]
    end = len(cache) * arguments[f"{prefix}block_size"]
    slots[:, :, 1:5], slots[1] = -1, -1
    outside = [end, end + 1, end + 40, 2**30, 2**31 - 1, -(2**31), -2]
    wrong = torch.tensor(outside * 3, dtype=torch.int32, device=DEVICE)[: slots.shape[2]]
    hostile = torch.where(slots < 0, wrong, slots)
    assert_right(run(arguments | {f"{prefix}topk_indices": hostile}), arguments)


def test_the_largest_legal_slot() -> None:
    # Blocks of the greatest length: the slot's division is the only thing that sees its size.
    layout = KVLayout("bf16", 16, 0)
    last = 2**31 - 1
    block_size = (last - 5) // 2  # the third block's sixth token
    pages = torch.zeros(1, 8 * layout.row_bytes, dtype=torch.uint8, device=DEVICE)
    pages[0, 5 * layout.row_bytes :] = 0x3F
    view = pages.as_strided((3, 8 * layout.row_bytes), (0, 1))
    slots = torch.tensor([[[last]]], dtype=torch.int32, device=DEVICE)
    q = torch.ones(1, 1, 1, 16, dtype=DTYPE, device=DEVICE)
    out, _ = sparse_decode_triton(
        q, view, slots, topk_length=None, extra_kv_cache=None, extra_topk_indices=None,
        extra_topk_length=None, attn_sink=None, layout=layout, block_size=block_size,
        extra_block_size=1, value_dim=16, softmax_scale=1.0, empty_lse=0.0, deterministic=False,
    )  # fmt: skip
    want = torch.full((16,), 0x3F3F, dtype=torch.int16).view(torch.bfloat16).to(DEVICE, DTYPE)
    assert torch.equal(out[0, 0, 0], want)


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1))
@settings(max_examples=300, deadline=None)
def test_division_by_a_product_is_exact(divisor: int, x: int) -> None:
    m, shift = fast_divisor(divisor)
    assert m < 2**32
    for value in (x, x // divisor * divisor, max(x // divisor * divisor - 1, 0)):
        assert ((2 * value * m) >> 32) >> shift == value // divisor


@given(st.integers(1, 5000), st.integers(0, 256), st.integers(1, 264))
@settings(max_examples=100, deadline=None)
def test_splits_are_as_long_as_they_may_be(programs: int, tiles: int, slots: int) -> None:
    split_tiles = choose_split_tiles(programs, tiles, slots)
    assert 1 <= split_tiles <= max(tiles, 1)
    if programs >= 2 * slots and tiles < 20:
        assert split_tiles == max(tiles, 1)


def test_opcheck_and_compile() -> None:
    shape = Shape(layout=SMALL, b=1, h=1, topk=4, extra_topk=3, has_length=True, has_sink=True)
    arguments = make_arguments(shape)
    # opcheck copies its inputs, which brings the blocks of a sliced cache together
    for prefix in ("", "extra_"):
        block_size = arguments[f"{prefix}block_size"]
        arguments[f"{prefix}kv_cache"] = allocate_kv_cache(16, block_size, SMALL, DEVICE)
    options = {n: x for n, x in arguments.items() if not isinstance(x, Tensor)}
    tensors = {n: x for n, x in arguments.items() if isinstance(x, Tensor)}
    torch.library.opcheck(
        torch.ops.model1.sparse_decode,
        (
            *(arguments[n] for n in ("q", "kv_cache", "topk_indices", "topk_length")),
            *(arguments[f"extra_{n}"] for n in ("kv_cache", "topk_indices", "topk_length")),
            arguments["attn_sink"], SMALL.name, SMALL.d_nope, SMALL.d_rope,
            arguments["block_size"], arguments["extra_block_size"], arguments["value_dim"],
            arguments["softmax_scale"], math.inf, False, "triton",
        ),
    )  # fmt: skip

    def call(**tensors: Tensor) -> Any:
        return sparse_decode(**tensors, **options, backend="triton")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(**tensors), call(**tensors), strict=True))


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, message in [
        (KVLayout("bf16", 40, 16), "multiples of 16, got 40 and 16"),
        (KVLayout("model1_fp8", 64, 24), "multiples of 16, got 64 and 24"),
        (KVLayout("bf16", 1024, 80), "at most 1088 channels here, got 1104"),
    ]:
        arguments = make_arguments(Shape(layout=layout, topk=3))
        with pytest.raises(BackendUnavailable, match=message):
            run(arguments)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = {n: x.cpu() if isinstance(x, Tensor) else x for n, x in arguments.items()}
    with pytest.raises(BackendUnavailable, match="sparse_decode/triton needs a GPU, device is cpu"):
        run(arguments)
