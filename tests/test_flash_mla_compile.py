"""The FlashMLA calls inside `torch.compile(fullgraph=True)`, with a holder from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from flash_mla_cases import BF16, DV, MODEL1, V32, as_tokens, make_scope
from torch import Tensor

import model1.flash_mla as flash_mla
from model1.ops.kv_cache import KVLayout, allocate_kv_cache, quantize_and_store

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Compilations of one function count together, up to a limit."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for x, y in zip(got, want, strict=True):
        assert x.stride() == y.stride()
        assert torch.equal(x, y)


def sparse_tensors(layout: KVLayout, device: str, b: int = 2) -> dict[str, Tensor]:
    """Two caches, lengths and a sink."""
    dtype = torch.float8_e4m3fn if layout.is_fp8 else torch.bfloat16
    lengths = list(range(9))[-b:]
    main, extra = (
        make_scope(layout, lengths, 2, topk, page, dtype=dtype, device=device)
        for topk, page in ((9, 64), (12, 2))
    )
    q = torch.randn(b, 2, 3, layout.d).bfloat16()
    return {
        "q": q.to(device), "k_cache": main.k_cache, "indices": main.indices,
        "topk_length": main.length, "extra_k_cache": extra.k_cache,
        "extra_indices_in_kvcache": extra.indices, "extra_topk_length": extra.length,
        "attn_sink": torch.randn(3).to(device),
    }  # fmt: skip


def sparse(
    tensors: dict[str, Tensor], holder: flash_mla.FlashMLASchedMeta | None = None
) -> tuple[Tensor, Tensor]:
    """With a holder of its own unless one is given."""
    return flash_mla.flash_mla_with_kvcache(
        **tensors, block_table=None, cache_seqlens=None, head_dim_v=DV,
        tile_scheduler_metadata=holder or flash_mla.get_mla_metadata()[0],
        is_fp8_kvcache=tensors["k_cache"].element_size() == 1,
    )  # fmt: skip


def dense_tensors(layout: KVLayout | None, device: str) -> dict[str, Tensor]:
    d = 576 if layout is None else layout.d
    if layout is None:
        k_cache = torch.randn(5, 64, 1, d).bfloat16()
    else:
        cache = allocate_kv_cache(5, 64, layout, "cpu")
        slots = torch.arange(320)
        quantize_and_store(torch.randn(320, d), cache, slots, layout=layout, block_size=64)
        k_cache = as_tokens(cache, layout, 64)
    tensors = {
        "q": torch.randn(2, 2, 4, d).bfloat16(), "k_cache": k_cache,
        "block_table": torch.tensor([[4, 1], [2, 0]], dtype=torch.int32),
        "cache_seqlens": torch.tensor([70, 5], dtype=torch.int32),
    }  # fmt: skip
    return {name: x.to(device) for name, x in tensors.items()}


def dense(
    tensors: dict[str, Tensor], holder: flash_mla.FlashMLASchedMeta | None = None
) -> tuple[Tensor, Tensor]:
    return flash_mla.flash_mla_with_kvcache(
        **tensors, head_dim_v=DV, causal=True,
        tile_scheduler_metadata=holder or flash_mla.get_mla_metadata()[0],
        is_fp8_kvcache=tensors["k_cache"].element_size() == 1,
    )  # fmt: skip


CASES: list[Any] = [
    pytest.param(sparse, sparse_tensors, layout, id=f"sparse {layout.name}")
    for layout in (MODEL1, V32, BF16)
] + [
    pytest.param(dense, dense_tensors, layout, id=f"dense {layout.name if layout else 'plain'}")
    for layout in (None, MODEL1, V32)
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("call", "make", "layout"), CASES)
def test_decode_with_a_holder_of_the_graph(call: Any, make: Any, layout: Any, device: str) -> None:
    tensors = make(layout, device)
    assert_equal(compiled(call)(tensors), call(tensors))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("call", "make", "layout"), [CASES[0], CASES[3]])
@pytest.mark.parametrize("is_used", [False, True])
def test_decode_with_a_holder_from_outside(
    call: Any, make: Any, layout: Any, is_used: bool, device: str
) -> None:
    """The graph leaves it as a call does, and serves other lengths with it."""
    tensors = make(layout, device)
    holder, expected = (flash_mla.get_mla_metadata()[0] for _ in range(2))
    want = call(tensors, expected)
    if is_used:
        call(tensors, holder)
    graph = compiled(call)
    assert_equal(graph(tensors, holder), want)
    assert holder == expected
    assert holder.have_initialized
    length = tensors["topk_length" if "indices" in tensors else "cache_seqlens"]
    length.fill_(4)
    got = graph(tensors, holder)
    assert_equal(got, call(tensors))
    assert not torch.equal(got[1], want[1])


@pytest.mark.parametrize("device", DEVICES)
def test_a_holder_kept_by_a_module_serves_every_layer(device: str) -> None:
    tensors, holder = sparse_tensors(MODEL1, device), flash_mla.get_mla_metadata()[0]

    def layers(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, _ = sparse(tensors, holder)
        return sparse(tensors | {"q": first}, holder)

    got = compiled(layers)(tensors)
    assert holder.have_initialized
    assert_equal(got, layers(tensors))


def test_what_a_call_refuses_a_graph_refuses_with_the_same_words() -> None:
    """PyTorch wraps what is raised while it traces."""
    holder, _ = flash_mla.get_mla_metadata()
    sparse(sparse_tensors(MODEL1, "cpu"), holder)
    with pytest.raises(Exception, match="the metadata was made for b = 2, got 1"):
        compiled(sparse)(sparse_tensors(MODEL1, "cpu", b=1), holder)
    wrong = sparse_tensors(MODEL1, "cpu")
    wrong["indices"] = wrong["indices"].long()
    with pytest.raises(Exception, match="topk_indices must be int32"):
        compiled(sparse)(wrong)


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_fwd_and_its_gradient(device: str) -> None:
    q, kv = (torch.randn(n, h, 512).bfloat16().to(device) for n, h in ((5, 3), (30, 1)))
    indices = torch.randint(-1, 30, (5, 1, 7), dtype=torch.int32).to(device)
    length = torch.tensor([7, 0, 3, 1, 7], dtype=torch.int32, device=device)

    def step(q: Tensor, kv: Tensor) -> tuple[Tensor, ...]:
        return flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.1, topk_length=length)

    assert_equal(compiled(step)(q, kv), step(q, kv))
    gradients = []
    for run in (step, compiled(step)):
        leaf = q.detach().requires_grad_()
        gradients += torch.autograd.grad(run(leaf, kv)[0].float().square().sum(), leaf)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packing", ["", "kv", "qkv"])
def test_varlen_and_its_gradient(packing: str, device: str) -> None:
    cu = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    qkv = torch.randn(8, 2, 512).bfloat16().to(device)

    def step(qkv: Tensor) -> tuple[Tensor, Tensor]:
        if packing == "qkv":
            return flash_mla.flash_attn_varlen_qkvpacked_func(qkv, cu, 5, 192, causal=True)
        q, kv = qkv[..., :192], qkv[..., 192:]
        if packing == "kv":
            return flash_mla.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, 5, 5, 192, causal=True)
        k, v = kv[..., :192], kv[..., 192:]
        return flash_mla.flash_attn_varlen_func(q, k, v, cu, cu, 5, 5, causal=True)

    assert_equal(compiled(step)(qkv), step(qkv))
    gradients = []
    for run in (step, compiled(step)):
        leaf = qkv.detach().requires_grad_()
        gradients += torch.autograd.grad(run(leaf)[0].float().square().sum(), leaf)
    assert torch.equal(*gradients)
