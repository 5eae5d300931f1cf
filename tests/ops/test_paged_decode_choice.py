"""Which calls of paged decode the Hopper kernel takes, and what "auto" makes of the others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops.backend import Operator
from model1.ops.kv_cache import KVLayout
from model1.ops.paged_decode import PAGED_DECODE, choice
from model1.ops.paged_decode.choice import choose_backend, hopper_call_refusal

MODEL1, V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
BF16_512, BF16_576 = KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64)


def _q(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _plain(blocks: int = 4, size: int = 64, hkv: int = 1, d: int = 576) -> Tensor:
    return torch.empty(blocks, size, hkv, d, dtype=torch.bfloat16)


def refusal(
    q: Tensor, kv_cache: Tensor, *, cu_seqlens_q: Tensor | None = None,
    layout: KVLayout | None = None, value_dim: int = 512, scale: float = 0.05,
    causal: bool = False,
) -> str:  # fmt: skip
    """Why the kernel does not take the call; "" if it does."""
    why = hopper_call_refusal(q, kv_cache, cu_seqlens_q, layout, value_dim, scale, causal)
    return why or ""


def test_what_the_kernel_takes() -> None:
    q = _q(3, 2, 5, 576)
    assert refusal(q, _plain()) == ""
    assert refusal(q[..., :512], _plain(d=512)) == ""
    assert refusal(_q(3, 1, 5, 576), _plain(), causal=True) == ""
    assert refusal(_q(3, 2, 128, 576), _plain(), causal=True) == ""
    for layout in (MODEL1, V32, BF16_512, BF16_576):
        cache = torch.empty(4, layout.block_bytes(64), dtype=torch.uint8)
        assert refusal(_q(3, 1, 5, layout.d), cache, layout=layout) == ""
    far = torch.empty(4, 66, 1, 576, dtype=torch.bfloat16)[1:, :64]
    assert refusal(q, far) == ""


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    q, cache = _q(3, 2, 5, 576), _plain()
    starts = torch.zeros(4, dtype=torch.int32)
    assert "bfloat16 queries, got torch.float16" in refusal(q.half(), cache.half())
    assert "got cu_seqlens_q" in refusal(q[:, 0], cache, cu_seqlens_q=starts)
    assert "512 or 576 channels" in refusal(q[..., :544], _plain(d=544))
    assert "got 544 with 512" in refusal(q[..., :544], _plain(d=544))
    assert "got 576 with 576" in refusal(q, cache, value_dim=576)
    for scale in (0.0, -0.05, math.nan):
        assert refusal(q, cache, scale=scale).endswith(f"above 0, got {scale}")
    for h in (1, 63, 65, 96):
        assert f"multiples of 64 heads if causal with several queries, got {h}" in refusal(
            _q(3, 2, h, 576), cache, causal=True
        )
    assert "one key head" in refusal(_q(3, 2, 4, 576), _plain(hkv=2))
    assert "got 1, 592 elements apart" in refusal(q, _plain(d=592)[..., :576])
    for layout in (KVLayout("fp32", 512, 64), KVLayout("model1_fp8", 512, 64)):
        blocks = torch.empty(4, layout.block_bytes(64), dtype=torch.uint8)
        got = refusal(q, blocks, layout=layout)
        assert got.endswith(f"got {layout.name} 512 + 64")
    memory = torch.empty(5 * 64 * 576, dtype=torch.bfloat16)
    strides = (64 * 576, 576, 576, 1)
    assert "16 bytes, got 2 + n * 73728" in refusal(
        q, memory.as_strided((4, 64, 1, 576), strides, 1)
    )
    odd = memory.as_strided((4, 64, 1, 576), (64 * 576 + 4, 576, 576, 1))
    assert "16 bytes, got 0 + n * 73736" in refusal(q, odd)


class OnGpu:
    """A query, or a ragged one, that says that it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda")

    def __init__(self, q: Tensor) -> None:
        self.dtype, self.shape = q.dtype, q.shape


@pytest.fixture
def winning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU where the Hopper kernel wins every call."""
    automatic = {"auto": "triton"}
    monkeypatch.setattr(Operator, "resolve", lambda self, name, device: automatic.get(name, name))
    monkeypatch.setattr(Operator, "offers_hopper", lambda self, device: True)
    monkeypatch.setattr(choice, "hopper_wins", lambda *sizes: True)


def chosen(backend: str = "auto", **changes: Any) -> str:
    fields: dict[str, Any] = {
        "q": _q(3, 2, 64, 576), "kv_cache": _plain(), "cu_seqlens_q": None, "layout": None,
        "value_dim": 512, "softmax_scale": 0.05, "causal": True, "deterministic": False,
    }  # fmt: skip
    fields |= changes
    q = OnGpu(fields.pop("q"))
    return choose_backend(PAGED_DECODE, backend, q, **fields)


REFUSED: dict[str, dict[str, Any]] = {
    "fp16": {"q": _q(3, 2, 64, 576, dtype=torch.float16)},
    "ragged": {"q": _q(6, 64, 576), "cu_seqlens_q": torch.zeros(4, dtype=torch.int32)},
    "channels": {"q": _q(3, 2, 64, 544), "kv_cache": _plain(d=544)},
    "values": {"value_dim": 576},
    "zero": {"softmax_scale": 0.0},
    "negative": {"softmax_scale": -0.05},
    "heads": {"q": _q(3, 2, 65, 576)},
    "key heads": {"kv_cache": _plain(hkv=2)},
    "layout": {"kv_cache": _q(4, 9, dtype=torch.uint8), "layout": KVLayout("fp32", 512, 64)},
    "start": {"kv_cache": _plain().flatten()[1:-575].unflatten(0, (-1, 1, 1, 576))},
}


@pytest.mark.usefixtures("winning")
@pytest.mark.parametrize("name", REFUSED)
def test_auto_is_portable_for_what_the_kernel_does_not_take(name: str) -> None:
    assert chosen(**REFUSED[name]) == "triton"
    with pytest.raises(BackendUnavailable, match=r"^paged_decode/hopper takes "):
        chosen("hopper", **REFUSED[name])


def test_auto_takes_the_kernel_where_it_wins_and_never_for_deterministic_rows(
    winning: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen() == "hopper"
    assert chosen("triton") == "triton"
    assert chosen(deterministic=True) == "triton"
    assert chosen("hopper", deterministic=True) == "hopper"
    monkeypatch.setattr(choice, "hopper_wins", lambda *sizes: False)
    assert chosen() == "triton"
    assert chosen("hopper") == "hopper"


def test_a_graph_is_traced_through_the_choice_and_its_start_is_asked_at_the_launch() -> None:
    def taken(q: Tensor, kv_cache: Tensor) -> Tensor:
        return q + (refusal(q, kv_cache) == "")

    compiled = torch.compile(taken, fullgraph=True, backend="aot_eager")
    q, cache = torch.zeros(1, 1, 3, 576, dtype=torch.bfloat16), _plain()
    shifted = torch.empty(cache.numel() + 1, dtype=torch.bfloat16)[1:].view_as(cache)
    assert taken(q, cache).all()
    assert compiled(q, cache).all()
    assert not taken(q, shifted).any()
    assert compiled(q, shifted).all()
