"""The Hopper kernels with 8 to 32 heads on the columns of products: right, whatever the call."""

from __future__ import annotations

import functools
from random import Random
from typing import Any

import paged_decode_cases as paged
import pytest
import sparse_decode_cases as decode
import sparse_prefill_cases as prefill
import torch
from torch import Tensor

from model1.ops.backend import hopper_refusal
from model1.ops.kv_cache import KVLayout

MODEL1, V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
BF16_512, BF16_576 = KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64)
EVERY = pytest.mark.parametrize(
    "layout", [MODEL1, V32, BF16_512, BF16_576], ids=["model1", "v32", "bf16 512", "bf16 576"]
)
HEADS = [1, 3, 8, 9, 16, 17, 32]
NOT_HERE = hopper_refusal(torch.device(decode.DEVICE))
on_hopper = [
    pytest.mark.gpu,
    pytest.mark.skipif(NOT_HERE is not None, reason=f"the Hopper kernel {NOT_HERE}"),
]


def call(arguments: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    from model1.ops.sparse_decode.hopper import sparse_decode_hopper

    return sparse_decode_hopper(**arguments, **{"deterministic": False} | options)


class TestOnHopper:
    pytestmark = on_hopper

    @pytest.mark.parametrize("first", range(5000, 5100, 20))
    @EVERY
    def test_random_sparse_decodes_are_right(self, layout: KVLayout, first: int) -> None:
        topks = [1, 63, 64, 65, 128, 200, 576, 2048]
        for number in range(first, first + 20):
            decode.check_random_case(number, [layout], HEADS, topks, [1, 2, 5, 16, 70], call)

    @pytest.mark.parametrize("h", [8, 16, 32])
    @pytest.mark.parametrize("has_length", [False, True])
    @EVERY
    def test_every_schedule_is_right(self, layout: KVLayout, has_length: bool, h: int) -> None:
        for b, extra_topk in ((3, 0), (66, 600), (140, 70)):
            arguments = decode.make_arguments(
                decode.Shape(
                    layout=layout, value_dim=512, b=b, s_q=2, h=h, topk=128, block_size=64,
                    extra_topk=extra_topk, has_length=has_length, has_sink=True,
                )
            )  # fmt: skip
            decode.assert_right(call(arguments), arguments)
            decode.assert_right(call(arguments, deterministic=True), arguments)

    def test_rows_without_keys_give_zero_and_the_empty_lse(self) -> None:
        arguments = decode.make_arguments(
            decode.Shape(layout=MODEL1, b=3, h=2, topk=70, extra_topk=20, has_sink=True)
        )
        arguments["topk_indices"][:2] = -1
        arguments["extra_topk_indices"][1:] = -1
        out, lse = call(arguments | {"empty_lse": 7.0})
        assert (lse[1] == 7.0).all()
        assert not out[1].any()
        empty = arguments | {"topk_indices": arguments["topk_indices"][..., :0]}
        decode.assert_right(call(empty), empty)

    @EVERY
    def test_a_nan_comes_out_in_its_row_only(self, layout: KVLayout) -> None:
        arguments = decode.make_arguments(
            decode.Shape(layout=layout, value_dim=512, b=2, s_q=2, h=3, topk=70, block_size=64)
        )
        want, want_lse = call(arguments)
        slot = (set(range(64)) - set(arguments["topk_indices"].flatten().tolist())).pop()
        arguments["topk_indices"][1, 0, 17] = slot  # whose bytes are 0xFF
        out, lse = call(arguments)
        assert out[1, 0].isnan().all()
        assert lse[1, 0].isnan().all()
        out[1, 0], lse[1, 0] = want[1, 0], want_lse[1, 0]
        assert torch.equal(out, want)
        assert torch.equal(lse, want_lse)

    @EVERY
    def test_deterministic_rows_do_not_depend_on_their_batch_mates(self, layout: KVLayout) -> None:
        arguments = decode.make_arguments(
            decode.Shape(
                layout=layout, value_dim=512, b=4, s_q=2, h=3, topk=300, extra_topk=200,
                has_sink=True,
            )
        )  # fmt: skip
        decode.check_batch_invariance(arguments, functools.partial(call, deterministic=True))

    @pytest.mark.parametrize("dims", [(512, 512), (576, 512)], ids=["512", "576"])
    def test_random_sparse_prefills_are_right(self, dims: tuple[int, int]) -> None:
        from model1.ops.sparse_prefill.hopper import sparse_prefill_hopper

        for h in HEADS:
            for t, topk, has_length in ((1, 2048, False), (150, 333, True), (17, 0, False)):
                arguments = prefill.make_arguments(
                    prefill.Shape(
                        t=t, h=h, s=592, topk=topk, d=dims[0], value_dim=dims[1],
                        has_length=has_length,
                    )
                )  # fmt: skip
                got = sparse_prefill_hopper(**arguments, deterministic=False)
                prefill.assert_right(got, arguments)

    @pytest.mark.parametrize("layout", [None, MODEL1, V32], ids=["plain", "model1", "v32"])
    def test_random_paged_decodes_are_right(self, layout: KVLayout | None) -> None:
        from model1.ops.paged_decode.hopper import paged_decode_hopper

        given: dict[str, Any] = {"cu_seqlens_q": None}
        for h in HEADS:
            draw = Random(h)
            s_q = draw.choice([n for n in (1, 2, 4) if n * h <= 32])
            shape = paged.Shape(
                h=h, d=576 if layout is None else layout.d, value_dim=512, has_sink=True,
                block_size=draw.choice([1, 48, 64, 256]), layout=layout, dtype=torch.bfloat16,
            )  # fmt: skip
            lengths = [draw.choice([0, 1, 64, 65, 700, 5000]) for _ in range(6)]
            case = paged.random_case(shape, lengths, [s_q] * 6, h)
            for deterministic in (False, True):
                options = given | {"deterministic": deterministic, "max_seqlen_q": s_q}
                got = paged_decode_hopper(**options | case.arguments(decode.DEVICE))
                paged.check(case, got, f"{shape}, {s_q} queries")


def test_up_to_32_heads_lie_on_the_columns() -> None:
    pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")
    from model1.ops.hopper.launch import body_sizes

    assert [body_sizes(False, h)["COLUMNS"] for h in HEADS] == [8, 8, 8, 16, 16, 32, 32]
    assert body_sizes(True, 33)["COLUMNS"] == body_sizes(False, 64)["COLUMNS"] == 0
