"""The FlashMLA calls on a CPU: results against fp64, FlashMLA's signatures and errors."""

from __future__ import annotations

import importlib
import inspect
import math
import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flash_mla_cases import (
    BF16,
    DV,
    MODEL1,
    V32,
    as_tokens,
    attend,
    check_dense_decode,
    check_sparse_decode,
    check_sparse_fwd,
    check_varlen,
    make_scope,
)
from line_budget import ROOT
from oracles import naive_attention

import model1.flash_mla as flash_mla
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, quantize_and_store

SIGNATURES = {
    "flash_mla_with_kvcache": "q, k_cache, block_table, cache_seqlens, head_dim_v, "
    "tile_scheduler_metadata, num_splits=None, softmax_scale=None, causal=False, "
    "is_fp8_kvcache=False, indices=None, attn_sink=None, extra_k_cache=None, "
    "extra_indices_in_kvcache=None, topk_length=None, extra_topk_length=None",
    "flash_mla_sparse_fwd": "q, kv, indices, sm_scale, d_v=512, attn_sink=None, topk_length=None",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, "
    "max_seqlen_kv, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False, "
    "is_varlen=True",
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen, head_dim_qk, "
    "dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False, is_varlen=True",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, "
    "max_seqlen_kv, head_dim_qk, dropout_p=0.0, softmax_scale=None, causal=False, "
    "deterministic=False, is_varlen=True",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_flash_mlas(name: str) -> None:
    parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
    found = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
    assert ", ".join(found) == SIGNATURES[name]
    assert {p.kind for p in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_names_are_where_flash_mla_has_them() -> None:
    interface = importlib.import_module("model1.flash_mla.flash_mla_interface")
    assert set(flash_mla.__all__) == {*SIGNATURES, "get_mla_metadata"}
    assert set(interface.__all__) == {*flash_mla.__all__, "FlashMLASchedMeta"}
    for name in interface.__all__:
        assert getattr(interface, name) is getattr(flash_mla, name)
    assert flash_mla.__version__ == "1.0.0"


def test_metadata_takes_anything_and_starts_empty() -> None:
    holder, num_splits = flash_mla.get_mla_metadata(torch.ones(2), 128, 1, is_fp8=True, topk=64)
    assert num_splits is None
    assert holder == flash_mla.FlashMLASchedMeta()
    assert not holder.have_initialized
    assert (holder.config, holder.tile_scheduler_metadata, holder.num_splits) == (None,) * 3
    assert flash_mla.get_mla_metadata()[0] is not holder


def test_the_oracle_agrees_with_plain_loops() -> None:
    q, kv = torch.randn(3, 2, 8), torch.randn(5, 8)
    visible = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    sink = torch.tensor([0.3, -math.inf])
    expanded = kv.expand(3, 5, 8)
    got = attend(q, expanded, expanded[..., :6], visible, 0.5, torch.float64, sink)
    want, want_lse = naive_attention(q, kv, visible, value_dim=6, scale=0.5, sink=sink)
    torch.testing.assert_close(got.out, want)
    torch.testing.assert_close(got.lse, want_lse)


@pytest.mark.parametrize("layout", [MODEL1, V32], ids=["model1", "v32"])
@pytest.mark.parametrize(("s_q", "h", "page"), [(1, 3, 64), (3, 5, 53), (2, 1, 2), (1, 2, 1)])
def test_sparse_decode(layout: KVLayout, s_q: int, h: int, page: int) -> None:
    main = make_scope(layout, [13, 0, 7], s_q, 13, page)
    check_sparse_decode(main, None, h, DV)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
def test_sparse_decode_over_two_caches(dtype: torch.dtype) -> None:
    main = make_scope(MODEL1, [6, 0, 0], 2, 6, 64, dtype=dtype)
    extra = make_scope(MODEL1, [3, 9, 0], 2, 9, 2, dtype=dtype)
    check_sparse_decode(main, extra, 4, DV)


def test_sparse_decode_without_lengths_and_sink() -> None:
    main, extra = (make_scope(V32, [n, n], 1, n, page) for n, page in ((5, 61), (7, 2)))
    check_sparse_decode(main, extra, 2, DV, with_length=False, with_sink=False)


@pytest.mark.parametrize(
    ("layout", "dtype", "dv"),
    [
        (BF16, torch.bfloat16, 512),
        (KVLayout("bf16", 512, 64), torch.bfloat16, 512),
        (KVLayout("fp32", 40, 0), torch.float32, 24),
        (KVLayout("model1_fp8", 192, 64), torch.uint8, 256),
        (KVLayout("v32_fp8", 128, 32), torch.uint8, 128),
    ],
    ids=["bf16 512", "bf16 576", "fp32 40", "model1 192+64", "v32 128+32"],
)
@pytest.mark.parametrize("q_dtype", [torch.bfloat16, torch.float32])
def test_sparse_decode_beyond_flash_mlas_formats(
    layout: KVLayout, dtype: torch.dtype, dv: int, q_dtype: torch.dtype
) -> None:
    main = make_scope(layout, [5, 4], 2, 5, 16, dtype=dtype)
    check_sparse_decode(main, None, 3, dv, q_dtype=q_dtype)


def test_a_holder_serves_calls_with_other_lengths() -> None:
    holder, _ = flash_mla.get_mla_metadata()
    for lengths in ([9, 2], [0, 9], [5, 5]):
        main = make_scope(MODEL1, lengths, 1, 9, 64)
        check_sparse_decode(main, None, 2, DV, holder=holder)
    assert holder.have_initialized
    with pytest.raises(AssertionError, match="the metadata was made for s_q = 1, got 2"):
        check_sparse_decode(make_scope(MODEL1, [9, 2], 2, 9, 64), None, 2, DV, holder=holder)


def test_a_single_block_may_have_any_stride() -> None:
    """As torch.zeros(1, 64, 1, 584) has: not a whole number of rows."""
    main = make_scope(MODEL1, [24], 1, 24, 64)
    assert main.k_cache.shape[0] == 1
    main.k_cache = main.k_cache.as_strided((1, 64, 1, 584), (64 * 584, 584, 584, 1))
    check_sparse_decode(main, None, 2, DV)


def test_a_holder_of_dense_decode_serves_calls_with_other_lengths() -> None:
    holder, _ = flash_mla.get_mla_metadata()
    for lengths in ([20, 0], [1, 20], [7, 20]):
        check_dense_decode(lengths, 1, 3, 1, 16, False, holder=holder)
    assert holder.have_initialized
    with pytest.raises(AssertionError, match="the metadata was made for h_q = 3, got 5"):
        check_dense_decode([20, 0], 1, 5, 1, 16, False, holder=holder)


@pytest.mark.parametrize("h", [129, 200])
def test_more_heads_than_flash_mla_takes(h: int) -> None:
    check_sparse_decode(make_scope(MODEL1, [5], 1, 5, 64), None, h, DV)
    check_dense_decode([5], 1, h, 1, 64, False)
    check_sparse_fwd(2, 40, h, 5)


def test_dense_decode_of_512_channels_which_ends_flash_mlas_process() -> None:
    check_dense_decode([20, 0, 7], 2, 3, 1, 64, True, d=512)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("s_q", "h", "hkv", "page"), [(1, 1, 1, 64), (2, 9, 3, 64), (4, 6, 2, 64), (2, 126, 1, 5)]
)
def test_dense_decode(s_q: int, h: int, hkv: int, page: int, causal: bool) -> None:
    check_dense_decode([20, 0, 7], s_q, h, hkv, page, causal)


def test_dense_decode_in_fp16() -> None:
    check_dense_decode([3, 65], 2, 3, 1, 64, True, q_dtype=torch.float16)


@pytest.mark.parametrize("layout", [MODEL1, V32], ids=["model1", "v32"])
def test_dense_decode_over_packed_tokens(layout: KVLayout) -> None:
    check_dense_decode([20, 0, 7], 2, 3, 1, 8, True, layout=layout)


@pytest.mark.parametrize(
    ("s_q", "s_kv", "h", "topk", "d"),
    [(1, 95, 2, 128, 576), (5, 300, 3, 64, 512), (3, 40, 1, 39, 512)],
)
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "sink and lengths"])
def test_sparse_fwd(s_q: int, s_kv: int, h: int, topk: int, d: int, extras: bool) -> None:
    check_sparse_fwd(s_q, s_kv, h, topk, d=d, with_sink=extras, with_length=extras)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
def test_varlen(packing: str, causal: bool) -> None:
    lengths_q, lengths_k = [3, 0, 9, 1], [5, 4, 2, 0]
    if packing == "qkv":
        lengths_k = lengths_q
    check_varlen(lengths_q, lengths_k, 2, 2, causal=causal, packing=packing)


@pytest.mark.parametrize(("hkv", "d"), [(4, 192), (2, 128)])
def test_varlen_is_differentiable(hkv: int, d: int) -> None:
    sizes = {"d": d, "dv": 128, "q_dtype": torch.float32}
    check_varlen([3, 5], [6, 4], 4, hkv, causal=True, with_grad=True, **sizes)


def test_varlen_refuses_as_flash_mla_does() -> None:
    q, k, v = torch.zeros(4, 2, 192), torch.zeros(4, 2, 192), torch.zeros(4, 2, 128)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    for misuse in ({"dropout_p": 0.1}, {"deterministic": True}):
        with pytest.raises(AssertionError):
            flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 4, 4, **misuse)
    with pytest.raises(RuntimeError):
        flash_mla.flash_attn_varlen_func(q, k[..., :128], v, cu, cu, 4, 4)


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "flash_mla_dropin.py"), run_name="__main__")
    assert "largest error: decode" in capsys.readouterr().out


def packed_call(**changes: Any) -> dict[str, Any]:
    """A valid sparse call over a MODEL1 cache, with some arguments replaced."""
    cache = allocate_kv_cache(2, 64, MODEL1, "cpu")
    call: dict[str, Any] = {
        "q": torch.zeros(2, 1, 3, 512, dtype=torch.bfloat16),
        "k_cache": as_tokens(cache, MODEL1, 64),
        "block_table": None,
        "cache_seqlens": None,
        "head_dim_v": 512,
        "tile_scheduler_metadata": flash_mla.get_mla_metadata()[0],
        "is_fp8_kvcache": True,
        "indices": torch.zeros(2, 1, 4, dtype=torch.int32),
    }
    return call | changes


def dense_call(**changes: Any) -> dict[str, Any]:
    call = packed_call(
        q=torch.zeros(2, 1, 4, 576, dtype=torch.bfloat16),
        k_cache=torch.zeros(3, 64, 2, 576, dtype=torch.bfloat16),
        block_table=torch.zeros(2, 1, dtype=torch.int32),
        cache_seqlens=torch.ones(2, dtype=torch.int32),
        is_fp8_kvcache=False,
        indices=None,
    )
    return call | changes


SLOTS, LENGTHS = torch.zeros(2, 1, 4, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
PLAIN = torch.zeros(2, 64, 1, 512, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("call", "changes"),
    [
        (packed_call, {"tile_scheduler_metadata": None}),
        (packed_call, {"num_splits": LENGTHS}),
        (packed_call, {"causal": True}),
        (packed_call, {"is_fp8_kvcache": False}),
        (dense_call, {"block_table": None}),
        (dense_call, {"cache_seqlens": None}),
        (dense_call, {"attn_sink": torch.zeros(4)}),
        (dense_call, {"extra_k_cache": PLAIN}),
        (dense_call, {"extra_indices_in_kvcache": SLOTS}),
        (dense_call, {"topk_length": LENGTHS}),
        (dense_call, {"extra_topk_length": LENGTHS}),
    ],
    ids=lambda x: x.__name__ if callable(x) else next(iter(x)),
)
def test_contradictions_are_assertion_errors(
    call: Callable[..., dict[str, Any]], changes: dict[str, Any]
) -> None:
    flash_mla.flash_mla_with_kvcache(**call())
    with pytest.raises(AssertionError):
        flash_mla.flash_mla_with_kvcache(**call(**changes))


@pytest.mark.parametrize(
    ("call", "changes", "message"),
    [
        (packed_call, {"q": torch.zeros(2, 3, 512, dtype=torch.bfloat16)}, "four dimensions"),
        (packed_call, {"q": torch.zeros(2, 1, 3, 512, dtype=torch.float64)}, "q must be bfloat16"),
        (packed_call, {"q": torch.zeros(2, 1, 3, 576, dtype=torch.bfloat16)}, "no cache layout"),
        (packed_call, {"k_cache": PLAIN}, "is_fp8_kvcache is for packed tokens"),
        (packed_call, {"k_cache": PLAIN.half(), "is_fp8_kvcache": False}, "no cache layout"),
        (packed_call, {"indices": SLOTS.long()}, "int32"),
        (packed_call, {"indices": SLOTS[:1]}, r"must be \[2, 1, topk\]"),
        (packed_call, {"indices": SLOTS[..., :0]}, r"indices must have topk > 0, got \[2, 1, 0\]"),
        (packed_call, {"attn_sink": torch.zeros(3).bfloat16()}, "attn_sink must be"),
        (packed_call, {"topk_length": LENGTHS[:1]}, "topk_length"),
        (packed_call, {"extra_topk_length": LENGTHS}, "extra"),
        (packed_call, {"extra_indices_in_kvcache": SLOTS}, "extra"),
        (packed_call, {"head_dim_v": 513}, "value_dim"),
        (dense_call, {"q": torch.zeros(2, 1, 4, 576)}, "dtype"),
        (dense_call, {"q": torch.zeros(2, 1, 3, 576, dtype=torch.bfloat16)}, "multiple of hkv"),
        (dense_call, {"block_table": torch.zeros(2, 1, dtype=torch.int64)}, "int32"),
        (dense_call, {"cache_seqlens": torch.ones(3, dtype=torch.int32)}, "cache_seqlens"),
        (dense_call, {"k_cache": torch.zeros(3, 64, 1, 656, dtype=torch.uint8)}, "like q"),
    ],
)
def test_unusable_tensors_are_runtime_errors(
    call: Callable[..., dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message) as raised:
        flash_mla.flash_mla_with_kvcache(**call(**changes))
    assert not isinstance(raised.value, ValueError)


@pytest.mark.parametrize("extra_page", [64, 2])
def test_two_caches_of_different_formats_are_refused(extra_page: int) -> None:
    cache = torch.zeros(2, extra_page, 1, 512, dtype=torch.bfloat16)
    call = packed_call(extra_k_cache=cache, extra_indices_in_kvcache=SLOTS)
    with pytest.raises(RuntimeError, match="extra_k_cache must be model1_fp8 like k_cache"):
        flash_mla.flash_mla_with_kvcache(**call)


@pytest.mark.parametrize("layout", [MODEL1, V32], ids=["model1", "v32"])
@pytest.mark.parametrize("gap", [0, 16, 144])
def test_blocks_may_lie_apart_by_no_whole_number_of_rows(layout: KVLayout, gap: int) -> None:
    cache = allocate_kv_cache(3, 64, layout, "cpu")
    kv = torch.randn(192, layout.d)
    quantize_and_store(kv, cache, torch.arange(192), layout=layout, block_size=64)
    padded = as_tokens(cache, layout, 64)
    buffer = torch.full((3, 64 * layout.bytes_per_token + gap), 0xFF, dtype=torch.uint8)
    near = as_tokens(buffer, layout, 64).copy_(padded)
    q = torch.randn(2, 2, 3, layout.d).bfloat16()
    sparse: dict[str, Any] = {"indices": torch.randint(-1, 192, (2, 2, 9), dtype=torch.int32)}
    table = torch.tensor([[2, 1], [0, 2]], dtype=torch.int32)
    lengths = torch.tensor([70, 128], dtype=torch.int32)
    for pages, options in (((None, None), sparse), ((table, lengths), {})):
        results = []
        for cache in (padded, near):
            holder, _ = flash_mla.get_mla_metadata()
            call = (q, cache, *pages, 512, holder, None, None, False, True)
            results.append(flash_mla.flash_mla_with_kvcache(*call, **options))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_block_strides_without_alignment_are_refused() -> None:
    cache = torch.zeros(2, 64 * 584 + 8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="a multiple of 16 bytes apart"):
        flash_mla.flash_mla_with_kvcache(**packed_call(k_cache=as_tokens(cache, MODEL1, 64)))


def test_sparse_fwd_refuses_with_runtime_errors() -> None:
    q, kv = torch.zeros(3, 2, 512).bfloat16(), torch.zeros(9, 1, 512).bfloat16()
    indices = torch.zeros(3, 1, 4, dtype=torch.int32)
    for bad in (
        (q, kv.expand(9, 2, 512), indices),
        (q, kv[:, 0], indices),
        (q, kv, indices[:, 0]),
        (q, kv, indices.long()),
        (q, kv, indices[..., :0]),
        (q, kv[..., :448], indices),
    ):
        with pytest.raises(RuntimeError):
            flash_mla.flash_mla_sparse_fwd(*bad, 0.1)


@pytest.fixture
def hostile_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    """As FlashMLA's tests set them while a call runs, with a default device that has no data."""

    def within(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with torch.device("meta"), torch.inference_mode():
                    return function(*args, **kwargs)
            finally:
                torch.set_default_dtype(dtype)

        return call

    for name in SIGNATURES:
        monkeypatch.setattr(flash_mla, name, within(getattr(flash_mla, name)))


@pytest.mark.usefixtures("hostile_defaults")
def test_no_call_depends_on_default_dtype_and_device() -> None:
    main, extra = make_scope(MODEL1, [6, 0], 2, 6, 64), make_scope(MODEL1, [3, 9], 2, 9, 2)
    check_sparse_decode(main, extra, 4, DV)
    check_dense_decode([20, 0], 2, 3, 1, 8, True, layout=V32)
    check_dense_decode([20, 0], 2, 3, 1, 8, True)
    check_sparse_fwd(5, 300, 3, 64)
    check_varlen([3, 0, 7], [5, 4, 7], 4, 2, causal=True)
