"""The Triton kernels of sparse prefill against double precision, interpreted or on a GPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from sparse_prefill_cases import (
    DEVICE,
    DTYPE,
    INVALID,
    Shape,
    assert_gradients_right,
    assert_right,
    check_batch_invariance,
    check_empty_lists,
    check_random_case,
    in_double,
    make_arguments,
)
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.sparse_prefill import SparsePrefillResult, sparse_prefill

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.compile_cases import KernelTarget
from model1.ops.sparse_prefill import pairs, portable, portable_backward
from model1.ops.sparse_prefill.config import Config, backward_config, forward_config

pytestmark = [
    pytest.mark.any_device,
    # Triton 3.6's interpreter turns run-time loop bounds into integers this way.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
    # Infinite sinks, empty lists and NaN keys are cases; NumPy remarks on their arithmetic.
    pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning"),
]

MODEL1, V32, SMALL = (512, 512), (576, 512), (48, 32)
TINY = Config(block_h=16, block_n=16, piece=16, num_warps=4, num_stages=1)


def run(arguments: dict[str, Any], **options: Any) -> SparsePrefillResult:
    return sparse_prefill(**arguments | options, backend="triton")


def run_with(config: Config, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return portable.sparse_prefill_triton(**arguments, config=config)


def backward_with(config: Config, arguments: dict[str, Any], **options: Any) -> Any:
    """(dq, dkv, dsink) of a loss with gradient 1, 2, .. of out."""
    out, _, lse = run(arguments)
    dout = torch.arange(1.0, out.numel() + 1, device=out.device).view(out.shape) / out.numel()
    tensors = {name: arguments[name] for name in ("topk_length", "attn_sink", "softmax_scale")}
    return portable_backward.sparse_prefill_backward_triton(
        dout.to(out), arguments["q"], arguments["kv"], arguments["topk_indices"], **tensors,
        out=out, lse=lse, config=config, **options,
    )  # fmt: skip


@pytest.mark.parametrize("number", range(10))
def test_random_calls_are_right(number: int) -> None:
    check_random_case(
        number, [SMALL, (16, 16), (80, 80), (144, 130)],
        t=[1, 2, 4], h=[1, 3, 17], s=[1, 9, 40], topk=[1, 15, 33],
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("first", range(1000, 1600, 20))
def test_random_calls_of_the_models_widths_are_right(first: int) -> None:
    for number in range(first, first + 20):
        check_random_case(
            number, [MODEL1, V32, SMALL],
            t=[1, 7, 62, 213], h=[1, 16, 17, 63, 64, 128], s=[1, 95, 592, 1840],
            topk=[1, 63, 64, 65, 200, 576],
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [MODEL1, V32])
def test_every_number_of_heads(dims: tuple[int, int]) -> None:
    for h in range(1, 131):
        shape = Shape(t=3, h=h, s=90, topk=70, d=dims[0], value_dim=dims[1])
        arguments = make_arguments(shape)
        assert_right(run(arguments), arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dims", [MODEL1, V32, SMALL])
def test_other_types(dims: tuple[int, int], dtype: torch.dtype) -> None:
    for h in (5, 24, 128):
        shape = Shape(d=dims[0], value_dim=dims[1], t=9, h=h, s=300, topk=150)
        arguments = make_arguments(shape, dtype=dtype)
        assert_right(run(arguments), arguments)
        assert_gradients_right(arguments)


@pytest.mark.parametrize("split_scores", [False, True])
@pytest.mark.parametrize("piece", [16, 32, 128])
def test_every_way_to_cut_the_work_is_right(piece: int, split_scores: bool) -> None:
    arguments = make_arguments(Shape(t=3, h=20, topk=40, d=80, value_dim=70))
    for block_h, block_n in ((16, 16), (32, 16), (16, 64)):
        config = replace(
            TINY, piece=piece, split_scores=split_scores, block_h=block_h, block_n=block_n
        )
        assert_right(run_with(config, arguments), arguments)


def test_every_way_to_cut_the_backward_is_right() -> None:
    arguments = make_arguments(Shape(t=2, h=20, topk=20, d=48, value_dim=20))
    want = backward_with(TINY, arguments, deterministic=False)
    limit = 2e-2 if DEVICE == "cuda" else 1e-5
    for block_h, block_n, piece, deterministic in ((16, 32, 128, True), (32, 16, 32, False)):
        config = replace(TINY, piece=piece, block_h=block_h, block_n=block_n)
        got = backward_with(config, arguments, deterministic=deterministic)
        for x, y in zip(got, want, strict=True):
            assert torch.allclose(x, y, rtol=limit, atol=limit)


@pytest.mark.parametrize("has_length", [False, True])
@pytest.mark.parametrize("has_sink", [False, True])
def test_gradients_are_right(has_length: bool, has_sink: bool) -> None:
    shape = Shape(t=2, h=18, has_length=has_length, has_sink=has_sink)
    arguments = make_arguments(shape)
    for deterministic in (False, True):
        assert_gradients_right(arguments, deterministic=deterministic)


@pytest.mark.parametrize("empty_lse", [-math.inf, math.inf, 7.0])
def test_queries_without_keys(empty_lse: float) -> None:
    arguments = make_arguments(Shape(t=3, has_length=False)) | {"empty_lse": empty_lse}
    arguments["topk_indices"][0] = torch.tensor(INVALID + INVALID + INVALID)[:20]
    arguments["topk_indices"][2] = -1
    out, max_logits, lse = run(arguments)
    assert_right((out, max_logits, lse), arguments)
    assert not out[[0, 2]].any()
    assert (lse[[0, 2]] == empty_lse).all()
    grads = assert_gradients_right(arguments)
    assert not grads["q"][[0, 2]].any()


def test_no_queries_and_no_keys() -> None:
    arguments = make_arguments(Shape(t=0))
    for deterministic in (False, True):
        grads = assert_gradients_right(arguments, deterministic=deterministic)
        assert not grads["kv"].any()
        assert not grads["attn_sink"].any()
    arguments = make_arguments(Shape(s=0))
    assert_right(run(arguments), arguments)
    for deterministic in (False, True):
        assert_gradients_right(arguments, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [False, True])
def test_empty_lists_are_lists_without_a_key(deterministic: bool) -> None:
    options = {"deterministic": deterministic, "backend": "triton"}
    for arguments in (make_arguments(Shape(topk=0)), make_arguments(Shape(topk=0, s=0))):
        check_empty_lists(arguments, options)


@pytest.mark.parametrize("has_length", [False, True])
def test_rows_know_neither_mates_nor_padding(has_length: bool) -> None:
    shape = Shape(t=5, h=17, has_length=has_length)
    if DEVICE == "cuda":
        shape = replace(shape, h=64, s=900, topk=300, d=512, value_dim=512)
    check_batch_invariance(make_arguments(shape), backend="triton")


def test_a_nan_that_is_named_comes_out() -> None:
    arguments = make_arguments(Shape(t=3, has_length=False, has_sink=False))
    arguments["topk_indices"][1:] = 3
    arguments["kv"][3:5] = 1.0
    arguments["kv"][3, -1] = math.nan  # a channel that is no value
    arguments["topk_indices"][0] = 4
    out, max_logits, lse = run(arguments)
    for result in (out, max_logits, lse):
        assert result[0].isfinite().all()
        assert result[1:].isnan().all()
    dq, dkv, _ = backward_with(TINY, arguments, deterministic=False)
    assert dq[0].isfinite().all()
    assert dq[1:].isnan().all()
    assert dkv[4].isfinite().all()
    assert dkv[3].isnan().all()


def test_an_index_that_occurs_twice_counts_twice() -> None:
    arguments = make_arguments(Shape(has_length=False))
    arguments["kv"].nan_to_num_(0.5)
    arguments["topk_indices"][:] = torch.tensor([7] * 13 + [2] * 7)
    assert_right(run(arguments), arguments)
    for deterministic in (False, True):
        assert_gradients_right(arguments, deterministic=deterministic)


@pytest.mark.parametrize("scale", [-0.7, 0.0, 30.0])
def test_any_scale(scale: float) -> None:
    arguments = make_arguments(Shape(t=2), dtype=torch.float32) | {"softmax_scale": scale}
    assert_right(run(arguments), arguments)


def test_rows_at_any_address_are_right() -> None:
    # no stride is a multiple of 16 bytes, and no axis lies where another would
    arguments = make_arguments(Shape(t=3))
    q, kv = arguments["q"], arguments["kv"]
    q = torch.cat([q, q[..., :3]], -1).transpose(0, 1).contiguous().transpose(0, 1)[..., :48]
    kv = torch.cat([kv, kv[..., :5]], -1)[..., :48]
    arguments |= {"q": q, "kv": kv}
    assert_right(run(arguments), arguments)
    assert_gradients_right(arguments)


def test_order_and_company_of_the_queries_change_no_bit() -> None:
    arguments = make_arguments(Shape(t=6, h=17))
    want = run(arguments)
    order = torch.randperm(6, device=DEVICE)
    per_query = ("q", "topk_indices", "topk_length")
    got = run(arguments, **{name: arguments[name][order] for name in per_query})
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y[order])
    for rows in (slice(0, 2), slice(2, 6)):
        got = run(arguments, **{name: arguments[name][rows] for name in per_query})
        for x, y in zip(got, want, strict=True):
            assert torch.equal(x, y[rows])


def test_deterministic_gradients_repeat_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    big = DEVICE == "cuda"
    shape = Shape(t=400 if big else 3, h=40 if big else 3, s=9, topk=70 if big else 20)
    arguments = make_arguments(shape)
    first = backward_with(TINY, arguments, deterministic=True)
    for _ in range(3 if big else 1):
        again = backward_with(TINY, arguments, deterministic=True)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    # with a buffer for one query at a time the sums are the same up to rounding
    monkeypatch.setattr(pairs, "PAIRS_BYTES", 1)
    limit = 2e-2 if big else 1e-5
    for x, y in zip(backward_with(TINY, arguments, deterministic=True), first, strict=True):
        assert torch.allclose(x, y, rtol=limit, atol=limit)


def test_a_gradient_without_a_layout() -> None:
    # sum() hands down an expanded 1
    arguments = make_arguments(Shape(t=2, has_sink=False))
    q = arguments["q"].detach().requires_grad_()
    run(arguments, q=q).out.sum().backward()
    assert q.grad is not None
    q64 = in_double(arguments)["q"].detach().requires_grad_()
    sparse_prefill(**in_double(arguments) | {"q": q64}, backend="ref").out.sum().backward()
    assert q64.grad is not None
    limit = 2e-2 if DEVICE == "cuda" else 1e-5
    assert torch.allclose(q.grad.double(), q64.grad, rtol=limit, atol=limit)


def test_float64_is_refused() -> None:
    arguments = make_arguments(Shape(), dtype=torch.float64)
    with pytest.raises(BackendUnavailable, match="has no float64: use backend='ref'"):
        run(arguments)


def test_one_kernel_carries_the_name_that_profilers_look_for() -> None:
    target = KernelTarget("cuda", 90)
    forward = {case.kernel.fn.__name__ for case in portable.shipped_kernels(target)}
    backward = {case.kernel.fn.__name__ for case in portable_backward.shipped_kernels(target)}
    assert forward == {"_sparse_attn_fwd_kernel"}
    assert not any("sparse_attn_fwd" in name for name in backward)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120, "gfx942"])
def test_configurations_cover_every_problem(arch: int | str) -> None:
    target = KernelTarget("cuda" if isinstance(arch, int) else "hip", arch)
    for h in (1, 16, 17, 64, 128):
        for d in (16, 512, 576, 1024):
            for item_bytes in (2, 4):
                configs = [forward_config(target, h, d, item_bytes)]
                configs += [backward_config(target, h, d, item_bytes, x) for x in (False, True)]
                for config in configs:
                    assert config.block_h <= 16 or h > 16
                    assert d <= 576 or config.block_h == 16


@pytest.mark.gpu
def test_more_queries_than_a_grid_axis() -> None:
    arguments = make_arguments(Shape(t=70000, h=17, s=256, topk=128))
    got = run(arguments)
    rows = torch.tensor([0, 1, 65535, 65536, 69999], device=DEVICE)
    per_query = ("q", "topk_indices", "topk_length")
    part = arguments | {name: arguments[name][rows].contiguous() for name in per_query}
    assert_right(tuple(x[rows] for x in got), part)


@pytest.mark.gpu
def test_keys_beyond_two_gibibytes() -> None:
    s = 2**31 // 512 + 100
    arguments = make_arguments(Shape(t=2, h=64, topk=128, d=512, value_dim=512, has_length=False))
    near = arguments["kv"]
    far = torch.full((s, 512), math.nan, dtype=DTYPE, device=DEVICE)
    far[s - len(near) :] = near
    index = arguments["topk_indices"]
    moved = torch.where((index >= 0) & (index < len(near)), index + (s - len(near)), -1)
    got = run(arguments, kv=far, topk_indices=moved.int())
    for x, y in zip(got, run(arguments), strict=True):
        assert torch.equal(x, y)


def test_more_pairs_of_one_query_than_32_bits_address_are_refused() -> None:
    arguments = make_arguments(Shape(t=1, h=17, s=9, topk=3, d=512, value_dim=512))
    out, _, lse = run(arguments)
    endless = torch.empty(1, 1, dtype=torch.int32, device=DEVICE).expand(1, 2**21)
    with pytest.raises(BackendUnavailable, match=r"got 2147483648 \(2 tiles"):
        portable_backward.sparse_prefill_backward_triton(
            out, arguments["q"], arguments["kv"], endless, topk_length=None, attn_sink=None,
            out=out, lse=lse, softmax_scale=1.0, deterministic=True,
            config=backward_config(KernelTarget("cuda", 90), 16, 512, 2, True),
        )  # fmt: skip
