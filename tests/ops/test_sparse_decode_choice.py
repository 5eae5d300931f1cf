"""Which calls of sparse decode the Hopper kernel takes, which it wins, on which machines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops import backend as backend_module
from model1.ops.backend import GLUON_TRITON, hopper_refusal
from model1.ops.kv_cache import KVLayout
from model1.ops.sparse_decode import SPARSE_DECODE, choice
from model1.ops.sparse_decode.choice import choose_backend, hopper_call_refusal, hopper_wins

MODEL1, V32 = KVLayout("model1_fp8", 448, 64), KVLayout("v32_fp8", 512, 64)
BF16_512, BF16_576 = KVLayout("bf16", 448, 64), KVLayout("bf16", 512, 64)


def test_what_the_kernel_does_not_take_is_refused_by_name() -> None:
    assert hopper_call_refusal(MODEL1, torch.bfloat16, 512, 0.05) is None
    assert hopper_call_refusal(V32, torch.bfloat16, 512, 0.05) is None
    wide = KVLayout("model1_fp8", 512, 64)
    assert "448 + 64" in str(hopper_call_refusal(wide, torch.bfloat16, 576, 1.0))
    for bf16 in (BF16_512, BF16_576, KVLayout("bf16", 512, 0)):
        assert hopper_call_refusal(bf16, torch.bfloat16, 512, 0.05) is None
    for other in (KVLayout("bf16", 448, 80), KVLayout("fp32", 448, 64)):
        got = f"got {other.name} 448 + {other.d_rope}"
        assert str(hopper_call_refusal(other, torch.bfloat16, 512, 1.0)).endswith(got)
    assert "value_dim is 576" in str(hopper_call_refusal(BF16_576, torch.bfloat16, 576, 1.0))
    assert "bfloat16" in str(hopper_call_refusal(MODEL1, torch.float16, 512, 1.0))
    assert "value_dim is 448" in str(hopper_call_refusal(MODEL1, torch.bfloat16, 448, 1.0))
    for scale in (0.0, -0.05, float("nan")):
        assert "above 0" in str(hopper_call_refusal(MODEL1, torch.bfloat16, 512, scale))


@pytest.mark.parametrize(
    ("version", "is_supported"),
    [
        ("3.5.1", False),
        ("3.6.0", True),
        ("3.6.9+git1a2b", True),
        ("3.60.0", False),
        ("3.7.0", False),
        ("4.6.0", False),
    ],
)
def test_gluon_is_supported_in_triton_3_6(
    version: str, is_supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GLUON_TRITON == (3, 6)
    monkeypatch.setattr(backend_module, "_has_triton", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backend_module, "_triton_version", lambda: version)
    refusal = hopper_refusal.__wrapped__(torch.device("cuda"))
    assert (refusal is None) == is_supported
    if refusal is not None:
        assert refusal == f"needs Triton 3.6, found {version}"


@pytest.mark.parametrize(
    ("layout", "rows", "h", "entries", "wins"),
    [
        (MODEL1, 96, 64, 640, True),
        (MODEL1, 48, 128, 16384, True),
        (MODEL1, 128, 8, 640, True),
        (V32, 64, 96, 2048, True),
        (MODEL1, 95, 64, 640, False),
        (MODEL1, 512, 7, 640, False),
        (MODEL1, 512, 129, 640, False),
        (V32, 512, 64, 639, False),
    ],
)
def test_it_wins_where_there_are_many_rows_and_heads(
    layout: KVLayout, rows: int, h: int, entries: int, wins: bool
) -> None:
    assert hopper_wins(layout, rows, h, entries) == wins


def test_auto_takes_it_where_it_wins_and_never_for_deterministic_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(type(SPARSE_DECODE), "resolve", lambda self, backend, device: "triton")
    monkeypatch.setattr(type(SPARSE_DECODE), "offers_hopper", lambda self, device: True)
    q = torch.empty(64, 2, 64, 512, dtype=torch.bfloat16)
    slots = torch.empty(64, 2, 640, dtype=torch.int32)

    def chosen(
        backend: str = "auto", q: Tensor = q, *, scale: float = 1.0, deterministic: bool = False,
        layout: KVLayout = MODEL1, value_dim: int = 512,
    ) -> str:  # fmt: skip
        return choose_backend(
            SPARSE_DECODE, backend, q, slots, None, layout, value_dim, scale, deterministic
        )

    assert chosen() == "hopper"
    assert chosen("triton") == "triton"
    assert chosen(deterministic=True) == "triton"
    assert chosen(q=q[:47]) == "triton"
    monkeypatch.setattr(choice, "hopper_wins", lambda *sizes: True)
    assert chosen(layout=BF16_512) == "hopper"
    assert chosen(deterministic=True) == "triton"
    refused: list[dict[str, Any]] = [
        {"scale": 0.0}, {"scale": -0.05}, {"scale": float("nan")}, {"q": q.float()},
        {"q": q.half()}, {"value_dim": 448}, {"layout": KVLayout("fp32", 448, 64)},
    ]  # fmt: skip
    for changes in refused:
        assert chosen(**changes) == "triton"
        monkeypatch.setattr(type(SPARSE_DECODE), "resolve", lambda self, backend, device: backend)
        with pytest.raises(BackendUnavailable, match=r"^sparse_decode/hopper "):
            chosen("hopper", **changes)
        monkeypatch.setattr(type(SPARSE_DECODE), "resolve", lambda self, backend, device: "triton")


def test_a_cache_that_is_copied_in_pieces_starts_at_one() -> None:
    pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")
    from model1.ops.hopper.launch import check_start

    memory = torch.empty(64, dtype=torch.uint8)
    check_start("sparse_decode", memory[16:])
    with pytest.raises(BackendUnavailable, match=r"^sparse_decode/hopper .* got 6 bytes behind"):
        check_start("sparse_decode", memory[22:])
