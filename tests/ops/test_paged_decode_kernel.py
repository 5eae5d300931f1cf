"""The Triton kernels of paged decode: interpreted here in small sizes, on a GPU in the models'."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from paged_decode_cases import (
    Case,
    Shape,
    attend,
    check,
    drawn_case,
    drawn_shape,
    like,
    random_case,
    without,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.kv_cache import KVLayout
from model1.ops.launch import device_target
from model1.ops.paged_decode import paged_decode
from model1.ops.paged_decode.portable_sizes import Config, Problem, Schedule, choose_schedule

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.paged_decode import portable
from model1.ops.paged_decode.portable import paged_decode_triton

# Triton's interpreter turns the bounds of loops into integers in a way that NumPy will forbid.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

INF = math.inf
MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
BF16 = KVLayout("bf16", 512, 64)
# Without a GPU the kernels run in Triton's interpreter, which a GPU build does not offer.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same kernels")
WHOLE = Config(block_m=16, block_n=16, num_warps=4, num_stages=1, tiles_per_sm=0)
# 37, 0 and 1 keys are 3, 1 and 1 tiles: of two parts the second holds the end of one request and
# two whole ones, five parts are a tile each.
BALANCED = [
    replace(WHOLE, num_parts=n, min_part_keys=16, deterministic_part_keys=32) for n in (2, 5)
]
CONFIGS = {"whole": WHOLE} | {f"{c.num_parts} parts": c for c in BALANCED}

INTERPRETED_SHAPES = [
    Shape(h=1, d=8, value_dim=8, block_size=16),
    Shape(h=9, hkv=3, d=40, value_dim=24, block_size=16, causal=True, has_sink=True),
    Shape(h=9, d=20, value_dim=17, block_size=32, has_sink=True),
    Shape(h=2, hkv=2, d=16, value_dim=16, block_size=1, causal=True),
    Shape(h=3, d=16, value_dim=5, block_size=7, causal=True, has_sink=True),
    Shape(h=3, hkv=3, d=24, value_dim=24, block_size=61),
    Shape(h=4, d=24, value_dim=16, block_size=16, dtype=torch.float16, causal=True),
    Shape(h=3, d=80, value_dim=64, block_size=5, layout=KVLayout("model1_fp8", 64, 16)),
    Shape(h=3, d=336, value_dim=336, block_size=16, layout=KVLayout("model1_fp8", 320, 16)),
    Shape(h=3, d=264, value_dim=200, block_size=16, layout=KVLayout("v32_fp8", 256, 8)),
    Shape(h=3, d=12, value_dim=12, block_size=4, layout=KVLayout("bf16", 8, 4)),
    Shape(h=3, d=12, value_dim=8, block_size=4, layout=KVLayout("fp32", 8, 4), causal=True),
    Shape(h=3, d=12, value_dim=8, block_size=4, layout=KVLayout("fp32", 8, 4), dtype=torch.float16),
]
_BF16: dict[str, Any] = {"dtype": torch.bfloat16}
GPU_SHAPES = [
    Shape(h=16, d=512, value_dim=512, block_size=64, layout=KVLayout("fp32", 448, 64), **_BF16),
    Shape(h=128, d=512, value_dim=512, block_size=64, layout=KVLayout("fp32", 448, 64), **_BF16),
    Shape(h=16, d=576, value_dim=512, block_size=64, **_BF16),
    Shape(h=128, d=576, value_dim=512, block_size=64, causal=True, **_BF16),
    Shape(h=128, d=512, value_dim=512, block_size=64, has_sink=True, **_BF16),
    Shape(h=1, d=576, value_dim=512, block_size=64, causal=True, has_sink=True, **_BF16),
    Shape(h=3, hkv=3, d=576, value_dim=512, block_size=16, **_BF16),
    Shape(h=9, hkv=3, d=576, value_dim=512, block_size=61, causal=True, **_BF16),
    Shape(h=63, hkv=3, d=576, value_dim=512, block_size=1, **_BF16),
    Shape(h=64, hkv=8, d=576, value_dim=512, block_size=64, causal=True, **_BF16),
    Shape(h=126, hkv=2, d=576, value_dim=512, block_size=64, causal=True, **_BF16),
    Shape(h=64, d=576, value_dim=512, block_size=64, dtype=torch.float16, causal=True),
    Shape(h=16, d=512, value_dim=512, block_size=128, dtype=torch.float16, has_sink=True),
    Shape(h=6, hkv=2, d=224, value_dim=224, block_size=32, causal=True, **_BF16),
    Shape(h=40, d=40, value_dim=24, block_size=64, **_BF16),
    Shape(h=5, d=100, value_dim=70, block_size=48, dtype=torch.float32, causal=True),
    Shape(h=16, d=512, value_dim=512, block_size=64, layout=MODEL1, **_BF16),
    Shape(h=128, d=512, value_dim=512, block_size=64, layout=MODEL1, causal=True, **_BF16),
    Shape(h=20, d=512, value_dim=448, block_size=61, layout=MODEL1, has_sink=True, **_BF16),
    Shape(h=16, d=576, value_dim=512, block_size=64, layout=V32, dtype=torch.float16),
    Shape(h=64, d=576, value_dim=512, block_size=2, layout=V32, causal=True, **_BF16),
    Shape(h=32, d=576, value_dim=512, block_size=64, layout=BF16, causal=True, **_BF16),
]
CASES_PER_GPU_SHAPE = 26


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def run(case: Case, device: str, config: Config | None = None, **options: Any) -> Any:
    """The kernels, with sizes that the public function would not take."""
    arguments = case.arguments(device) | options
    ragged = {"cu_seqlens_q": None, "max_seqlen_q": 0, "deterministic": False}
    return paged_decode_triton(**(ragged | arguments), config=config)


@interpreted
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("number", range(len(INTERPRETED_SHAPES)))
def test_interpreted_kernels_compute_the_formula(number: int, name: str) -> None:
    # neighbours take turns: both would double what is already the longest test of these kernels
    ragged = (number + list(CONFIGS).index(name)) % 2 == 1
    q_lengths = [3, 0, 1] if ragged else [2, 2, 2]
    shape = INTERPRETED_SHAPES[number]
    case = random_case(shape, [37, 0, 1], q_lengths, number, ragged=ragged)
    check(case, run(case, "cpu", CONFIGS[name]), str(shape))


@interpreted
@pytest.mark.parametrize("config", [WHOLE, BALANCED[0]], ids=["whole", "2 parts"])
def test_scores_summed_after_the_scaling_are_right(config: Config) -> None:
    # what Hopper's sizes do with many rows
    shape = Shape(h=3, d=40, value_dim=24, block_size=16, causal=True, has_sink=True)
    case = random_case(shape, [37, 0, 1], [2, 2, 2], 0)
    check(case, run(case, "cpu", replace(config, channels=16, split_scores=True)), "split scores")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(GPU_SHAPES)))
def test_random_cases_on_a_gpu(number: int) -> None:
    for idx in range(CASES_PER_GPU_SHAPE):
        seed = number * CASES_PER_GPU_SHAPE + idx
        case, deterministic = drawn_case(GPU_SHAPES[number], seed, longest=900)
        got = paged_decode(**case.arguments("cuda"), deterministic=deterministic)
        check(case, got, f"case {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(1000, 1012))
def test_random_shapes_on_a_gpu(number: int) -> None:
    shape = drawn_shape(number)
    for seed in range(10 * number, 10 * number + 10):
        case, deterministic = drawn_case(shape, seed, longest=900)
        got = paged_decode(**case.arguments("cuda"), deterministic=deterministic)
        check(case, got, f"{shape}, case {seed}")


DEVICES = [
    pytest.param("cpu", marks=interpreted, id="interpreter"),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def _shape(device: str, **options: Any) -> Shape:
    if device == "cpu":
        return Shape(**({"h": 2, "d": 24, "value_dim": 24, "block_size": 16} | options))
    sizes = {"h": 16, "d": 576, "value_dim": 512, "block_size": 64, "dtype": torch.bfloat16}
    return Shape(**(sizes | options))


@pytest.mark.parametrize("device", DEVICES)
def test_causal_rows_before_the_first_key_are_empty(device: str) -> None:
    case = random_case(_shape(device, causal=True), [2, 0, 1], [4, 4, 4], 0)
    for config in (WHOLE, *BALANCED):
        out, lse = run(case, device, config)
        check(case, (out, lse), "short")
        assert torch.equal(lse[:, :, 0].isposinf().sum(1).cpu(), torch.tensor([2, 4, 3]))


@pytest.mark.parametrize("device", DEVICES)
def test_deterministic_rows_do_not_know_their_mates(device: str) -> None:
    # on a GPU a part has 2,048 keys, and the wider table room for more parts than one step merges
    lengths, longer = ([37, 0, 70, 5], 20) if device == "cpu" else ([9000, 0, 12000, 5], 700)
    case = random_case(_shape(device, causal=True), lengths, [2] * 4, 0)
    config = BALANCED[0] if device == "cpu" else None
    whole = run(case, device, config, deterministic=True)
    # other mates, another order, a wider table: other numbers of programs
    arguments = case.arguments(device)
    order = torch.tensor([2, 0])
    wide = torch.full((2, longer), 2147480000, dtype=torch.int32)
    wide[:, : case.block_table.shape[1]] = case.block_table[order]
    chosen = {name: arguments[name][order] for name in ("q", "cache_seqlens")}
    ragged = {"cu_seqlens_q": None, "max_seqlen_q": 0, "deterministic": True}
    part = paged_decode_triton(
        **(ragged | arguments | chosen | {"block_table": wide.to(device)}), config=config
    )
    for got, want in zip(part, whole, strict=True):
        assert torch.equal(got, want[order])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [None, MODEL1, V32], ids=lambda x: x.name if x else "plain")
def test_deterministic_rows_do_not_know_mates_with_more_queries(
    layout: KVLayout | None, device: str
) -> None:
    """Ragged queries: the mates' number decides how many tiles of rows a request may have."""
    lengths, config = ([37, 0, 5], BALANCED[0]) if device == "cpu" else ([9000, 0, 300], None)
    if layout and device == "cpu":
        layout = KVLayout(layout.name, layout.tile, 16)
    options: dict[str, Any] = {"layout": layout, "d": layout.d} if layout else {}
    options |= {"value_dim": layout.d_nope} if layout else {}
    for h in (2,) if device == "cpu" else (16, 128):
        shape = _shape(device, h=h, causal=True, has_sink=True, **options)
        case = random_case(shape, lengths, [2, 9, 1], 0, ragged=True)
        want = run(case, device, config, deterministic=True)
        check(case, want, str(shape))
        arguments = case.arguments(device)
        for i, rows in ((0, case.query_rows[0]), (2, case.query_rows[2])):
            n = rows.stop - rows.start
            alone = {name: arguments[name][i : i + 1] for name in ("block_table", "cache_seqlens")}
            alone |= {"q": arguments["q"][rows], "max_seqlen_q": n}
            alone["cu_seqlens_q"] = torch.tensor([0, n], dtype=torch.int32, device=device)
            got = run(case, device, config, deterministic=True, **alone)
            for one, whole in zip(got, want, strict=True):
                assert torch.equal(one, whole[rows])


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_know_the_lengths_of_its_mates(device: str) -> None:
    case = random_case(_shape(device), [40, 33, 7], [1, 1, 1], 0)
    config = BALANCED[0] if device == "cpu" else None
    want = run(case, device, config)
    shorter = torch.tensor([40, 0, 3], dtype=torch.int32, device=device)
    got = run(case, device, config, cache_seqlens=shorter)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_that_is_seen_comes_out(device: str) -> None:
    case = random_case(_shape(device), [20, 20], [1, 1], 0)
    case.kv_cache[case.block_table[1, 0], 3] = math.nan
    for config in (WHOLE, *BALANCED):
        out, lse = run(case, device, config)
        assert out[1].isnan().all()
        assert lse[1].isnan().all()
        assert out[0].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_do_not_overflow(device: str) -> None:
    case = random_case(_shape(device), [40, 17], [1, 1], 0)
    for scale in (200.0, -200.0):
        scaled = without(case, softmax_scale=scale)
        check(scaled, run(scaled, device, BALANCED[1]), f"scale {scale}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("name", "d_nope", "d_rope"),
    [
        ("model1_fp8", 64, 32), ("model1_fp8", 320, 0), ("model1_fp8", 576, 64),
        ("model1_fp8", 960, 32), ("model1_fp8", 1024, 64), ("v32_fp8", 640, 0), (None, 832, 64),
    ],
)  # fmt: skip
def test_any_split_of_the_latent(name: Any, d_nope: int, d_rope: int, device: str) -> None:
    layout, d = name and KVLayout(name, d_nope, d_rope), d_nope + d_rope
    shape = _shape(device, h=17, d=d, value_dim=d_nope, layout=layout, causal=True, has_sink=True)
    case = random_case(shape, [20, 0, 9], [2, 2, 2], 0)
    check(case, run(case, device), str(shape))


@pytest.mark.parametrize("device", DEVICES)
def test_strides_are_free(device: str) -> None:
    case = random_case(_shape(device, hkv=1), [19, 3], [2, 2], 0)
    want = run(case, device, WHOLE)
    q = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.full((*case.kv_cache.shape[:2], 3, case.q.shape[-1]), math.nan, dtype=q.dtype)
    wide[:, :, 1:2] = case.kv_cache
    got = run(case, device, WHOLE, q=like(q, device), kv_cache=like(wide[:, :, 1:2], device))
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES[:1])
def test_the_op_describes_itself_to_pytorch(device: str) -> None:
    case = random_case(_shape(device), [20, 3], [1, 1], 0)
    a, shape = case.arguments(device), _shape(device)
    torch.library.opcheck(
        torch.ops.model1.paged_decode.default,
        (
            a["q"], a["kv_cache"], a["block_table"], a["cache_seqlens"], None, None, None, 0, 0,
            shape.block_size, 0, shape.value_dim, 0.3, True, INF, True, "triton",
        ),
    )  # fmt: skip


@pytest.mark.any_device
def test_more_channels_than_fit_are_refused() -> None:
    case = random_case(Shape(h=1, d=1104, value_dim=8, block_size=4), [3], [1], 0)
    with pytest.raises(BackendUnavailable, match="takes 1088 channels here, got 1104"):
        run(case, "cuda" if torch.cuda.is_available() else "cpu")


def _problem(**changes: Any) -> Problem:
    fields: dict[str, Any] = {
        "layout": None, "dtype": torch.bfloat16, "d": 576, "value_dim": 8, "group": 16, "hkv": 1,
        "block_size": 64, "b": 1, "s_q": 1, "max_seqlen": 65536, "softmax_scale": 1.0,
        "causal": False, "empty_lse": INF, "deterministic": False, "stored": torch.bfloat16,
    }  # fmt: skip
    return Problem(**(fields | changes))


def test_parts_fill_the_processors_and_no_more() -> None:
    config = Config(block_m=16, block_n=32, num_warps=4, num_stages=3)

    def schedule(**changes: Any) -> Schedule:
        return choose_schedule(config, _problem(**changes), 132)

    for b in (1, 132, 1000):
        assert schedule(b=b).num_parts == 132
    assert schedule(b=9, s_q=67).form == "whole"
    assert schedule(group=128).num_parts == 132 // 8
    assert schedule(max_seqlen=256).num_parts == 2
    assert schedule(s_q=133).form == "whole"
    assert schedule(s_q=2, is_ragged=True).form == "whole"
    assert schedule(is_ragged=True).form == "balanced"
    assert schedule(max_seqlen=0).form == "whole"
    assert len({schedule(b=b, deterministic=True).part_tiles for b in (1, 7, 300)}) == 1


@pytest.mark.gpu
def test_slots_beyond_two_gib_are_addressed() -> None:
    # 65,536 blocks of 64 tokens of 576 channels in bf16: 4.5 GiB
    q = torch.randn(1, 1, 16, 576, dtype=torch.bfloat16, device="cuda")
    cache = torch.empty(65536, 64, 1, 576, dtype=torch.bfloat16, device="cuda").fill_(math.nan)
    keys = torch.randn(128, 1, 576, dtype=torch.bfloat16, device="cuda")
    cache[65535], cache[40000] = keys[:64], keys[64:]
    table = torch.tensor([[65535, 40000]], dtype=torch.int32, device="cuda")
    lengths = torch.tensor([128], dtype=torch.int32, device="cuda")
    options = {"value_dim": 512, "softmax_scale": 576**-0.5}
    got = paged_decode(q, cache, table, lengths, **options)
    low = torch.tensor([[0, 1]], dtype=torch.int32, device="cuda")
    want = paged_decode(q, keys.view(2, 64, 1, 576), low, lengths, **options)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_long_context_of_one_request_uses_every_processor() -> None:
    case = random_case(_shape("cuda", h=128), [65000], [1], 0)
    check(case, paged_decode(**case.arguments("cuda")), "65,000 tokens")
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    problem = _problem(group=128, max_seqlen=65536)
    config = portable.choose_config(device_target(torch.device("cuda", 0)), problem)
    schedule = choose_schedule(config, problem, num_sms)
    assert schedule.num_parts * schedule.row_tiles >= 0.9 * num_sms


@pytest.mark.gpu
@pytest.mark.parametrize("b", [1, 200])
def test_a_profiler_sees_the_names_that_benchmarks_look_for(b: int) -> None:
    arguments = random_case(_shape("cuda"), [900] * b, [1] * b, 0).arguments("cuda")
    paged_decode(**arguments)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        paged_decode(**arguments)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() or []]
    assert sum("flash_fwd_splitkv_mla_kernel" in name for name in names) == 1
    assert sum("flash_fwd_mla_combine_kernel" in name for name in names) <= 1


@interpreted
def test_the_interpreter_is_no_default() -> None:
    case = random_case(Shape(h=1, d=8, value_dim=8, block_size=4), [3], [1], 0)
    got: tuple[Tensor, Tensor] = paged_decode(**case.arguments())
    want = attend(case, torch.float64)
    assert (got[0] - want[0]).abs().max() < 1e-6
