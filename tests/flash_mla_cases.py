"""One case of each FlashMLA call: inputs as FlashMLA's users have them, and a check in fp64.

Unused memory is NaN, tensors are slices of larger ones. CPU and GPU tests share these checks.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import model1.flash_mla as flash_mla
from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    quantize_and_store,
)
from model1.testing.compare import assert_close_rows

MODEL1 = KVLayout("model1_fp8", 448, 64)
V32 = KVLayout("v32_fp8", 512, 64)
BF16 = KVLayout("bf16", 448, 64)
DV = 512
GARBAGE_BLOCK = 2147480000  # in block tables, behind a request's last block
# Of sparse prefill, where everything outside the rows of kv is ignored.
GARBAGE_INDICES = (-(2**31), -123456, -1, 114514, 2147480000, 2**31 - 1)


def with_slack(x: Tensor) -> Tensor:
    """The same values in a slice of a larger tensor, NaN (or the largest integer) around them."""
    sizes = [n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16]
    value = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
    larger = torch.full(sizes, value, dtype=x.dtype, device=x.device)
    view = larger[tuple(slice(n) for n in x.shape)]
    return view.copy_(x)


class Expected(NamedTuple):
    """fp64, but for the baseline: probabilities and result rounded, as plain PyTorch does."""

    out: Tensor
    baseline: Tensor
    max_logits: Tensor
    lse: Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, dtype: torch.dtype,
    sink: Tensor | None = None,
) -> Expected:  # fmt: skip
    """q [t, h, d] over k and v [t, n, d] where valid [t, n]; dtype is the baseline's."""
    k, v = (x.double().masked_fill(~valid[..., None], 0.0) for x in (k, v))
    logits = torch.einsum("thd,tnd->thn", q.double(), k) * scale
    logits = logits.masked_fill(~valid[:, None], -math.inf)
    lse = logits.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, sink.double())
    weights = torch.exp(logits - total.masked_fill(total == -math.inf, 0.0)[..., None])
    baseline = torch.einsum("thn,tnd->thd", weights.to(dtype).double(), v).to(dtype)
    out = torch.einsum("thn,tnd->thd", weights, v)
    max_logits = torch.nn.functional.pad(logits, (0, 1), value=-math.inf).amax(-1)
    return Expected(out, baseline, max_logits, lse)


def assert_results(
    out: Tensor, lse: Tensor, expected: Expected, empty_lse: float = math.inf
) -> None:
    """out [t, h, dv] and lse [t, h]; rows without keys are 0 and empty_lse."""
    assert_close_rows(out, expected.baseline, expected.out)
    is_empty = expected.lse == -math.inf
    want_lse = expected.lse.masked_fill(is_empty, empty_lse)[..., None]
    assert lse.dtype == torch.float32
    assert_close_rows(lse[..., None], want_lse, want_lse)
    assert not out[is_empty].any()


def random_sink(h: int, device: str) -> Tensor:
    """Natural logits, a third of them +inf and a third -inf."""
    sink = torch.randn(h, dtype=torch.float32)
    sink[0::3], sink[1::3] = math.inf, -math.inf
    return sink.to(device)


@dataclass
class Scope:
    """One paged cache and lists of slots into it; slots that no list counts are NaN."""

    k_cache: Tensor  # [num_blocks, page, 1, bytes]
    indices: Tensor  # [b, s_q, topk]
    length: Tensor  # [b]
    keys: Tensor  # [b s_q, topk, d], dequantised
    valid: Tensor  # [b s_q, topk]


def make_scope(
    layout: KVLayout, lengths: list[int], s_q: int, topk: int, page: int,
    *, dtype: torch.dtype = torch.float8_e4m3fn, device: str = "cpu",
) -> Scope:  # fmt: skip
    """Distinct slots of a cache of twice their number, some of them -1, for every query."""
    b = len(lengths)
    num_blocks = -(-2 * b * s_q * topk // page)
    indices = torch.randperm(num_blocks * page, dtype=torch.int32)[: b * s_q * topk]
    indices = indices.view(b, s_q, topk)
    indices[:, :, 2::5] = -1
    length = torch.tensor(lengths, dtype=torch.int32)
    counted = indices.masked_fill(torch.arange(topk) >= length[:, None, None], -1)
    cache = allocate_kv_cache(num_blocks, page, layout, "cpu").fill_(0xFF)
    slots = counted[counted >= 0]
    kv = (torch.randn(len(slots), layout.d, dtype=torch.float32) / 4).clamp(-1, 1)
    quantize_and_store(kv, cache, slots, layout=layout, block_size=page)
    keys = gather_and_dequantize(cache, counted, layout=layout, block_size=page)
    return Scope(
        k_cache=as_tokens(cache.to(device), layout, page).view(dtype),
        indices=with_slack(indices.to(device)),
        length=length.to(device),
        keys=keys.view(b * s_q, topk, layout.d).to(device),
        valid=(counted >= 0).view(b * s_q, topk).to(device),
    )


def as_tokens(cache: Tensor, layout: KVLayout, page: int) -> Tensor:
    """A cache of ours with the shape that FlashMLA gives it; no copy."""
    width = layout.bytes_per_token
    return cache.as_strided((cache.shape[0], page, 1, width), (cache.stride(0), width, width, 1))


def check_sparse_decode(
    main: Scope, extra: Scope | None, h: int, dv: int, *,
    q_dtype: torch.dtype = torch.bfloat16, with_sink: bool = True, with_length: bool = True,
    holder: flash_mla.FlashMLASchedMeta | None = None,
) -> None:  # fmt: skip
    """Run `flash_mla_with_kvcache` with indices and compare; positional, as callers do."""
    b, s_q, _ = main.indices.shape
    device = main.k_cache.device
    d = main.keys.shape[-1]
    q = with_slack(torch.randn(b, s_q, h, d, dtype=torch.float32).clamp(-1, 1).to(device, q_dtype))
    sink = random_sink(h, str(device)) if with_sink else None
    scopes = [main] if extra is None else [main, extra]
    lengths = [scope.length if with_length else None for scope in scopes] + [None]
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, main.k_cache, None, None, dv, holder or flash_mla.get_mla_metadata()[0], None,
        d**-0.55, False, main.k_cache.element_size() == 1, main.indices, sink,
        *(None, None) if extra is None else (extra.k_cache, extra.indices),
        lengths[0], lengths[1],
    )  # fmt: skip
    assert out.shape == (b, s_q, h, dv)
    assert out.dtype == q_dtype
    assert out.is_contiguous()
    assert lse.shape == (b, h, s_q)
    keys = torch.cat([scope.keys for scope in scopes], 1).to(q_dtype)
    valid = torch.cat([scope.valid for scope in scopes], 1)
    expected = attend(
        q.reshape(b * s_q, h, d), keys, keys[..., :dv], valid, d**-0.55, q_dtype, sink
    )
    assert_results(out.flatten(0, 1), lse.transpose(1, 2).reshape(-1, h), expected)


def check_dense_decode(
    lengths: list[int], s_q: int, h: int, hkv: int, page: int, causal: bool, *, dv: int = DV,
    q_dtype: torch.dtype = torch.bfloat16, layout: KVLayout | None = None, device: str = "cpu",
    d: int = 576, holder: flash_mla.FlashMLASchedMeta | None = None,
) -> None:  # fmt: skip
    """Run `flash_mla_with_kvcache` with a block table and compare; the default softmax scale.

    d: of plain keys.
    """
    b, d = len(lengths), d if layout is None else layout.d
    kv = (torch.randn(b, max(lengths), hkv, d, dtype=torch.float32) / 4).clamp(-1, 1)
    q = torch.randn(b, s_q, h, d, dtype=torch.float32).to(device, q_dtype)
    k_cache, table, kv = fill_pages(kv.to(q_dtype), lengths, page, layout, device)
    out, lse = flash_mla.flash_mla_with_kvcache(
        with_slack(q), k_cache, with_slack(table),
        torch.tensor(lengths, dtype=torch.int32, device=device), dv,
        holder or flash_mla.get_mla_metadata()[0], None, causal=causal,
        is_fp8_kvcache=layout is not None,
    )  # fmt: skip
    assert out.shape == (b, s_q, h, dv)
    assert out.dtype == q_dtype
    assert lse.shape == (b, h, s_q)
    group = h // hkv
    for i, length in enumerate(lengths):
        end = length - (s_q - 1 - torch.arange(s_q)) * causal
        valid = (torch.arange(kv.shape[1]) < end[:, None]).to(device)
        for head in range(hkv):
            heads = slice(head * group, (head + 1) * group)
            keys = kv[i, :, head].expand(s_q, -1, -1)
            expected = attend(q[i, :, heads], keys, keys[..., :dv], valid, d**-0.5, q_dtype)
            assert_results(out[i, :, heads], lse[i, heads].T, expected)


def fill_pages(
    kv: Tensor, lengths: list[int], page: int, layout: KVLayout | None, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    """kv [b, s, hkv, d] in shuffled pages, the block table, and kv as it reads back from there.

    NaN behind each length in the cache, garbage behind the last page in the table.
    """
    b, s, hkv, d = kv.shape
    max_blocks = -(-s // page) + 1
    table = torch.randperm(b * max_blocks, dtype=torch.int32).view(b, max_blocks)
    plain = torch.full((b * max_blocks, page, hkv, d), math.nan, dtype=kv.dtype)
    position = torch.arange(s)
    slots = table[:, position // page].long() * page + position % page
    slots = slots.masked_fill(position >= torch.tensor(lengths)[:, None], -1)
    plain.view(-1, hkv, d)[slots[slots >= 0]] = kv[slots >= 0]
    for i, length in enumerate(lengths):
        table[i, -(-length // page) :] = GARBAGE_BLOCK
    if layout is None:
        return plain.to(device), table.to(device), kv.to(device)
    packed = allocate_kv_cache(b * max_blocks, page, layout, "cpu").fill_(0xFF)
    quantize_and_store(
        kv[:, :, 0].flatten(0, 1), packed, slots.flatten(), layout=layout, block_size=page
    )
    kv = gather_and_dequantize(packed, slots, layout=layout, block_size=page, dtype=kv.dtype)
    k_cache = as_tokens(packed.to(device), layout, page).view(torch.float8_e4m3fn)
    return k_cache, table.to(device), kv[:, :, None].to(device)


def check_sparse_fwd(
    s_q: int, s_kv: int, h: int, topk: int, *, d: int = 576, with_sink: bool = True,
    with_length: bool = True, q_dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
) -> None:  # fmt: skip
    """Run `flash_mla_sparse_fwd` on lists with garbage, an empty row and rows of NaN keys."""
    q, kv = (torch.randn(n, hh, d, dtype=torch.float32) / 2 for n, hh in ((s_q, h), (s_kv, 1)))
    indices = torch.full((s_q, topk), -1, dtype=torch.int32)
    for row in indices[:, : s_kv - 1]:
        row[:] = torch.randperm(s_kv - 1)[: len(row)]
    for offset, garbage in enumerate((*GARBAGE_INDICES, s_kv)):
        indices[:, 3 + offset :: 11] = garbage
    indices[-1] = GARBAGE_INDICES[0]
    length = torch.randint(0, topk + 1, (s_q,), dtype=torch.int32)
    length[0] = topk
    indices = indices[:, None]
    q, kv, indices = (with_slack(x.to(device)) for x in (q.to(q_dtype), kv.to(q_dtype), indices))
    kv[-1] = math.nan  # no list names the last row
    sink = random_sink(h, device) if with_sink else None
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(
        q, kv, indices, sm_scale=d**-0.5, attn_sink=sink,
        topk_length=length.to(device) if with_length else None,
    )  # fmt: skip
    assert out.shape == (s_q, h, DV)
    assert out.dtype == q_dtype
    rows = indices[:, 0].long()
    valid = (rows >= 0) & (rows < s_kv)
    if with_length:
        valid &= torch.arange(topk, device=device) < length.to(device)[:, None]
    keys = kv[rows.masked_fill(~valid, 0), 0]
    expected = attend(q, keys, keys[..., :DV], valid, d**-0.5, q_dtype, sink)
    assert_results(out, lse, expected)
    assert max_logits.dtype == torch.float32
    want = expected.max_logits[..., None]
    assert_close_rows(max_logits[..., None], want, want)


def check_varlen(
    lengths_q: list[int], lengths_k: list[int], h: int, hkv: int, *, causal: bool = False,
    packing: str = "", d: int = 192, dv: int = 128, with_grad: bool = False,
    q_dtype: torch.dtype = torch.bfloat16, device: str = "cpu",
) -> None:  # fmt: skip
    """Run a `flash_attn_varlen_*` function and compare; gradients, if asked for, as in fp32."""
    shapes = ((sum(lengths_q), h, d), (sum(lengths_k), hkv, d), (sum(lengths_k), hkv, dv))
    inputs = [torch.randn(shape, dtype=torch.float32).to(device, q_dtype) for shape in shapes]
    inputs = [x.requires_grad_(with_grad) for x in inputs]
    out, lse = run_varlen(*inputs, lengths_q, lengths_k, causal, packing)
    assert out.shape == (sum(lengths_q), h, dv)
    assert lse.shape == (sum(lengths_q), h)
    wide = [x.detach().double().requires_grad_(with_grad) for x in inputs]
    want = torch.zeros_like(out, dtype=torch.float64)
    for rows, keys in zip(ranges(lengths_q), ranges(lengths_k), strict=True):
        s_q, s_k = len(rows), len(keys)
        if s_q == 0:
            continue
        end = s_k - (s_q - 1 - torch.arange(s_q)) * causal
        valid = (torch.arange(s_k) < end[:, None]).to(device)
        for head in range(h):
            q = wide[0][rows, head, None]
            k, v = (x[keys, head * hkv // h].expand(s_q, -1, -1) for x in wide[1:])
            expected = attend(q, k, v, valid, d**-0.5, q_dtype)
            got = (out[rows, head, None], lse[rows, head, None])
            assert_results(*got, expected, empty_lse=-math.inf)
            want = want.index_put((torch.tensor(rows), torch.tensor(head)), expected.out[:, 0])
    if with_grad:
        out_grad = torch.randn(out.shape, dtype=torch.float32)
        got = torch.autograd.grad(out, inputs, out_grad)
        for x, y in zip(got, torch.autograd.grad(want, wide, out_grad.double()), strict=True):
            assert_close_rows(x, y, y)


def ranges(lengths: list[int]) -> list[list[int]]:
    """The rows of each sequence of a ragged batch."""
    ends = list(itertools.accumulate(lengths))
    return [list(range(end - n, end)) for n, end in zip(lengths, ends, strict=True)]


def run_varlen(
    q: Tensor, k: Tensor, v: Tensor, lengths_q: list[int], lengths_k: list[int],
    causal: bool, packing: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Call the function for inputs packed as "", "kv" or "qkv"."""
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=q.device)
        for n in (lengths_q, lengths_k)
    )
    sizes = (cu_q, cu_k, max(lengths_q), max(lengths_k))
    d = q.shape[-1]
    if packing == "qkv":
        qkv = torch.cat([q, k, v], -1)
        return flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu_q, sizes[2], d, causal=causal)
    if packing == "kv":
        kv = torch.cat([k, v], -1)
        return flash_mla.flash_attn_varlen_kvpacked_func(q, kv, *sizes, d, causal=causal)
    return flash_mla.flash_attn_varlen_func(q, k, v, *sizes, causal=causal)
