"""The sizes of sparse decode's kernels: right for every latent and GPU, batch-invariant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_decode_cases import (
    DEVICE,
    DTYPE,
    Shape,
    assert_right,
    check_batch_invariance,
    make_arguments,
    run,
)

from model1.ops.kv_cache import KVLayout

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.compile_cases import KernelTarget
from model1.ops.sparse_decode import portable
from model1.ops.sparse_decode.portable import choose_config, sparse_decode_triton

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
SMALL = KVLayout("model1_fp8", 64, 32)


@pytest.mark.parametrize(
    ("name", "d_nope", "d_rope"),
    [
        ("model1_fp8", 64, 32), ("model1_fp8", 320, 0), ("model1_fp8", 576, 64),
        ("model1_fp8", 960, 32), ("model1_fp8", 1024, 64), ("v32_fp8", 640, 0), ("bf16", 832, 64),
    ],
)  # fmt: skip
def test_any_split_of_the_latent(name: Any, d_nope: int, d_rope: int) -> None:
    layout = KVLayout(name, d_nope, d_rope)
    shape = Shape(layout=layout, h=17, s_q=2, b=1, topk=18, extra_topk=5, has_sink=True)
    arguments = make_arguments(replace(shape, value_dim=d_nope))
    assert_right(run(arguments), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("layout", [MODEL1, V32, KVLayout("model1_fp8", 960, 64)])
def test_the_sizes_of_every_gpu_are_right_on_this_one(layout: KVLayout, arch: int) -> None:
    for h in (8, 24, 128):
        config = choose_config(KernelTarget("cuda", arch), h, DTYPE, layout)
        shape = Shape(layout=layout, h=h, topk=100, extra_topk=33, has_length=True, has_sink=True)
        arguments = make_arguments(shape)
        for split_tiles in (1, 9):
            cut = replace(config, split_tiles=split_tiles)
            got = sparse_decode_triton(**arguments, deterministic=False, config=cut)
            assert_right(got, arguments)


def test_pieces_of_two_scales_are_right() -> None:
    shape = Shape(layout=KVLayout("model1_fp8", 192, 64), h=3, topk=40, extra_topk=9)
    arguments = make_arguments(shape)
    config = portable.Config(block_h=16, block_n=32, num_warps=4, num_stages=1)
    got = sparse_decode_triton(**arguments, deterministic=False, config=config)
    assert_right(got, arguments)


def test_pieces_of_two_scales_are_for_tiles_of_32_keys() -> None:
    for target in (
        KernelTarget("cuda", 80),
        KernelTarget("cuda", 89),
        KernelTarget("hip", "gfx942"),
    ):
        for h in (8, 24, 128):
            config = choose_config(target, h, torch.bfloat16, MODEL1)
            row = portable._constants(MODEL1, 512, config, target)["ROW"]
            assert row.widest_piece == (64 if config.block_n < 32 else 128)


@pytest.mark.parametrize(("extra_topk", "has_length"), [(27, False), (0, False), (27, True)])
def test_deterministic_rows_know_neither_mates_nor_padding(
    extra_topk: int, has_length: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = 1
    if DEVICE == "cpu":  # where tiles are narrow and slow
        monkeypatch.setattr(portable, "_DETERMINISTIC_KEYS", 32)
        monkeypatch.setattr(portable, "_LIST_BLOCK", 32)
    else:
        scale = 26
    shape = Shape(
        layout=SMALL, b=4, s_q=2, h=1, topk=30 * scale, extra_topk=extra_topk * scale,
        has_length=has_length, has_sink=True,
    )  # fmt: skip
    check_batch_invariance(make_arguments(shape), lambda call: run(call, deterministic=True))


@pytest.mark.gpu
@pytest.mark.parametrize("h", [16, 64, 128])
@pytest.mark.parametrize("layout", [MODEL1, V32, KVLayout("bf16", 512, 64)])
def test_deterministic_rows_of_the_models_widths(layout: KVLayout, h: int) -> None:
    shape = Shape(layout=layout, b=4, s_q=2, h=h, topk=2048, block_size=64, extra_topk=1500)
    for has_length in (False, True):
        arguments = make_arguments(replace(shape, has_length=has_length, has_sink=True))
        check_batch_invariance(arguments, lambda call: run(call, deterministic=True))
