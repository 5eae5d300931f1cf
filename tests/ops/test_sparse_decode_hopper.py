"""The Hopper kernel of sparse decode: right, batch-invariant, chosen only where it may run."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_decode_cases import (
    DEVICE,
    Shape,
    assert_right,
    check_batch_invariance,
    check_random_case,
    make_arguments,
    store,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import hopper_refusal
from model1.ops.kv_cache import KVLayout, allocate_kv_cache
from model1.ops.sparse_decode import sparse_decode

MODEL1, V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
BF16_512, BF16_576 = KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64)
BOTH = pytest.mark.parametrize("layout", [MODEL1, V32], ids=["model1", "v32"])
BF16 = pytest.mark.parametrize("layout", [BF16_512, BF16_576], ids=["bf16 512", "bf16 576"])
EVERY = pytest.mark.parametrize(
    "layout", [MODEL1, V32, BF16_512, BF16_576], ids=["model1", "v32", "bf16 512", "bf16 576"]
)
NOT_HERE = hopper_refusal(torch.device(DEVICE))
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}"),
]
hopper = functools.partial(sparse_decode, backend="hopper")


def make_call(**shape: Any) -> dict[str, Any]:
    return make_arguments(Shape(value_dim=512, **shape))


def call(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    return hopper(**arguments, **options)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("first", range(3000, 3600, 20))
    def test_random_calls_are_right(self, first: int) -> None:
        heads = [1, 3, 8, 16, 17, 32, 63, 64, 65, 126, 128, 130]
        topks = [1, 63, 64, 65, 128, 200, 576, 2048]
        for number in range(first, first + 20):
            check_random_case(number, [MODEL1, V32], heads, topks, [1, 2, 5, 16, 70], call)

    @pytest.mark.parametrize("b", [3, 66, 70, 140])
    @pytest.mark.parametrize("has_length", [False, True])
    @BOTH
    def test_every_schedule_is_right(self, layout: KVLayout, b: int, has_length: bool) -> None:
        shape = Shape(
            layout=layout, value_dim=512, b=b, s_q=2, h=64, topk=128, block_size=64,
            extra_block_size=2, has_length=has_length, has_sink=True,
        )  # fmt: skip
        for extra_topk in (0, 600):
            arguments = make_arguments(replace(shape, extra_topk=extra_topk))
            assert_right(call(arguments), arguments)
            assert_right(call(arguments, deterministic=True), arguments)

    @pytest.mark.parametrize("first", range(4000, 4200, 20))
    def test_random_calls_on_bf16_caches_are_right(self, first: int) -> None:
        heads = [1, 3, 16, 63, 64, 65, 128, 130]
        topks = [0, 1, 63, 64, 65, 129, 333, 577, 2047, 2048]
        for number in range(first, first + 20):
            check_random_case(number, [BF16_512, BF16_576], heads, topks, [1, 2, 5], call)

    @pytest.mark.parametrize("b", [3, 66, 70, 300])
    @pytest.mark.parametrize("has_length", [False, True])
    @BF16
    def test_every_schedule_is_right_on_bf16_caches(
        self, layout: KVLayout, b: int, has_length: bool
    ) -> None:
        shape = Shape(
            layout=layout, value_dim=512, b=b, h=64, topk=128, block_size=64, extra_block_size=2,
            has_length=has_length, has_sink=True,
        )  # fmt: skip
        for extra_topk in (0, 70):
            arguments = make_arguments(replace(shape, extra_topk=extra_topk))
            assert_right(call(arguments), arguments)
            assert_right(call(arguments, deterministic=True), arguments)

    def test_rows_without_keys_give_zero_and_the_empty_lse(self) -> None:
        arguments = make_arguments(
            Shape(layout=MODEL1, b=3, h=2, topk=70, extra_topk=20, has_sink=True)
        )
        arguments["topk_indices"][:2] = -1
        arguments["extra_topk_indices"][1:] = -1
        out, lse = call(arguments | {"empty_lse": 7.0})
        assert (lse[1] == 7.0).all()
        assert not out[1].any()
        empty = arguments | {"topk_indices": arguments["topk_indices"][..., :0]}
        assert_right(call(empty), empty)

    @pytest.mark.parametrize(("code", "scale"), [(0x7F, None), (0xFF, None), (None, 255)])
    def test_a_nan_comes_out_in_its_row_only(self, code: int | None, scale: int | None) -> None:
        arguments = make_arguments(Shape(layout=MODEL1, b=2, s_q=2, h=3, topk=70, block_size=64))
        want, want_lse = call(arguments)
        cache = arguments["kv_cache"]
        unused = set(range(64)) - set(arguments["topk_indices"].flatten().tolist())
        slot = unused.pop()
        arguments["topk_indices"][1, 0, 17] = slot
        store(cache, torch.tensor([slot]), MODEL1, 64)
        if code is not None:
            cache[0, slot * 576 + 447] = code
        if scale is not None:
            cache[0, 64 * 576 + slot * 8 + 6] = scale
        cache[0, 64 * 576 + slot * 8 + 7] = 255  # the byte that means nothing
        out, lse = call(arguments)
        assert out[1, 0].isnan().all()
        assert lse[1, 0].isnan().all()
        out[1, 0], lse[1, 0] = want[1, 0], want_lse[1, 0]
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

    @pytest.mark.parametrize("exponents", [(0, 30), (118, 137), (134, 136)])
    def test_scales_of_any_size(self, exponents: tuple[int, int]) -> None:
        arguments = make_arguments(Shape(layout=MODEL1, b=2, h=64, topk=128, block_size=64))
        cache = arguments["kv_cache"]
        scales = cache[:, 64 * 576 : 64 * 584].unflatten(1, (64, 8))[..., :7]
        drawn = torch.randint(*exponents, scales.shape, device=DEVICE, dtype=torch.uint8)
        scales.copy_(torch.where(scales == 255, scales, drawn))
        arguments["softmax_scale"] = 2.0 ** -max(exponents[1] - 118, 4)
        assert_right(call(arguments), arguments)

    def test_v32_scales_of_any_size(self) -> None:
        arguments = make_arguments(
            Shape(layout=V32, value_dim=512, b=2, h=64, topk=128, block_size=64)
        )
        rows = arguments["kv_cache"][:, : 64 * 656].unflatten(1, (64, 656))
        scales = rows[..., 512:528].view(torch.float32)
        drawn = torch.exp2(torch.rand_like(scales) * 30 - 30) * (1 + torch.rand_like(scales))
        scales.copy_(torch.where(scales.isfinite(), drawn, scales))
        assert_right(call(arguments), arguments)

    @pytest.mark.parametrize("where", ["code", "scale", "rope"])
    def test_a_nan_in_a_v32_row_comes_out_in_its_row_only(self, where: str) -> None:
        arguments = make_arguments(
            Shape(layout=V32, value_dim=512, b=2, s_q=2, h=3, topk=70, block_size=64)
        )
        want, want_lse = call(arguments)
        unused = set(range(64)) - set(arguments["topk_indices"].flatten().tolist())
        slot = unused.pop()
        arguments["topk_indices"][1, 0, 17] = slot
        store(arguments["kv_cache"], torch.tensor([slot]), V32, 64)
        row = arguments["kv_cache"][0, slot * 656 : (slot + 1) * 656]
        if where == "code":
            row[511] = 0xFF
        elif where == "scale":
            row[524:528].view(torch.float32).fill_(torch.nan)
        else:
            row[528:656].view(torch.bfloat16)[-1] = torch.nan
        out, lse = call(arguments)
        assert out[1, 0].isnan().all()
        assert lse[1, 0].isnan().all()
        out[1, 0], lse[1, 0] = want[1, 0], want_lse[1, 0]
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

    @BF16
    def test_a_nan_in_a_bf16_row_comes_out_in_its_row_only(self, layout: KVLayout) -> None:
        arguments = make_arguments(
            Shape(layout=layout, value_dim=512, b=2, s_q=2, h=3, topk=70, block_size=64)
        )
        want, want_lse = call(arguments)
        slot = (set(range(64)) - set(arguments["topk_indices"].flatten().tolist())).pop()
        arguments["topk_indices"][1, 0, 17] = slot
        store(arguments["kv_cache"], torch.tensor([slot]), layout, 64)
        end = (slot + 1) * layout.row_bytes
        arguments["kv_cache"][0, end - 2 : end] = 0xFF
        out, lse = call(arguments)
        assert out[1, 0].isnan().all()
        assert lse[1, 0].isnan().all()
        out[1, 0], lse[1, 0] = want[1, 0], want_lse[1, 0]
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

    def test_bf16_slots_beyond_two_to_the_31_elements(self) -> None:
        layout, size = BF16_576, BF16_576.block_bytes(2)
        stride = -(-(2**32) // layout.row_bytes) * layout.row_bytes
        memory = torch.empty(stride + size, dtype=torch.uint8, device=DEVICE)
        arguments = make_arguments(
            Shape(layout=layout, value_dim=512, b=1, h=64, topk=2, block_size=2)
        )
        arguments["kv_cache"] = cache = memory.as_strided((2, size), (stride, 1))
        cache.fill_(0xFF)
        arguments["topk_indices"][0, 0] = torch.tensor([3, 0])
        store(cache, torch.tensor([0, 3]), layout, 2)
        assert_right(call(arguments), arguments)
        del arguments, cache, memory
        torch.cuda.empty_cache()

    @pytest.mark.parametrize("prefix", ["", "extra_"])
    def test_a_cache_that_starts_between_pieces_is_refused(self, prefix: str) -> None:
        arguments = make_arguments(
            Shape(layout=BF16_576, value_dim=512, topk=70, block_size=4, extra_topk=5)
        )
        cache = arguments[f"{prefix}kv_cache"]
        flat = cache.new_empty(len(cache) * cache.stride(0) + 2)
        moved = flat.as_strided(cache.shape, cache.stride(), 2).copy_(cache)
        with pytest.raises(BackendUnavailable, match="multiples of 16 bytes, got 2 bytes behind"):
            call(arguments | {f"{prefix}kv_cache": moved})

    def test_slots_beyond_two_gibibytes(self) -> None:
        stride = -(-(3 << 30) // MODEL1.row_bytes) * MODEL1.row_bytes
        cache = allocate_kv_cache(2 * stride // MODEL1.block_stride_bytes(1), 1, MODEL1, DEVICE)
        cache = cache.as_strided((2, MODEL1.block_bytes(2)), (stride, 1))
        arguments = make_arguments(Shape(layout=MODEL1, b=1, topk=2, block_size=2))
        arguments["kv_cache"] = cache
        arguments["topk_indices"][0, 0] = torch.tensor([3, 0])
        store(cache, torch.tensor([0, 3]), MODEL1, 2)
        assert_right(call(arguments), arguments)

    @EVERY
    def test_slots_outside_their_cache_do_not_count(self, layout: KVLayout) -> None:
        arguments = make_arguments(
            Shape(layout=layout, value_dim=512, b=2, topk=70, block_size=4, extra_topk=65)
        )
        hostile = dict(arguments)
        for prefix in ("", "extra_"):
            slots = arguments[f"{prefix}topk_indices"]
            end = len(arguments[f"{prefix}kv_cache"]) * arguments[f"{prefix}block_size"]
            wrong = torch.tensor([end, end + 40, 2**31 - 1, -(2**31), -2], device=DEVICE).int()
            drawn = wrong[torch.randint(5, slots.shape, device=DEVICE)]
            hostile[f"{prefix}topk_indices"] = torch.where(slots < 0, drawn, slots)
        assert_right(call(hostile), arguments)

    @pytest.mark.parametrize("layout", [MODEL1, BF16_576], ids=["model1", "bf16 576"])
    def test_queries_of_any_strides(self, layout: KVLayout) -> None:
        arguments = make_arguments(Shape(layout=layout, value_dim=512, b=3, s_q=2, h=5, topk=90))
        q = arguments["q"]
        padded = torch.nn.functional.pad(q, (1, 2))  # rows of 515 numbers: no tensor map has them
        for same in (q.transpose(0, 1).contiguous().transpose(0, 1), padded[..., 1:-2]):
            assert_right(call(arguments | {"q": same}), arguments)
        one = arguments | {"q": q[:1, :1].expand_as(q)}
        assert_right(call(one), one)

    @EVERY
    def test_deterministic_rows_do_not_depend_on_their_batch_mates(self, layout: KVLayout) -> None:
        arguments = make_arguments(
            Shape(
                layout=layout,
                value_dim=512,
                b=4,
                s_q=2,
                h=3,
                topk=300,
                extra_topk=200,
                has_sink=True,
            )
        )
        check_batch_invariance(arguments, functools.partial(call, deterministic=True))

    @pytest.mark.parametrize("b", [2, 70])
    @pytest.mark.parametrize("has_length", [False, True])
    @pytest.mark.parametrize("layout", [MODEL1, BF16_576], ids=["model1", "bf16 576"])
    def test_a_captured_call_follows_other_lists_and_lengths(
        self, layout: KVLayout, b: int, has_length: bool
    ) -> None:
        shape = Shape(
            layout=layout, value_dim=512, b=b, s_q=2, h=64, topk=200, has_length=has_length
        )
        first, second = make_arguments(shape), make_arguments(shape)
        names = ["q", "kv_cache", "topk_indices"] + ["topk_length"] * has_length
        held = first | {n: first[n].clone() for n in names}
        graph = torch.cuda.CUDAGraph()
        call(held)
        with torch.cuda.graph(graph):
            got = call(held)
        for arguments in (second, first):
            for n in names:
                held[n].copy_(arguments[n])
            graph.replay()
            assert_right(got, arguments)


def test_a_machine_that_is_no_hopper_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = make_arguments(Shape(layout=MODEL1), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    hopper_refusal.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"sparse_decode/hopper needs"):
        call(arguments)
    hopper_refusal.cache_clear()
