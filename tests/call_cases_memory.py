"""Calls of n-gram memories and hyper-connections, for `call_cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from calls import Call, call_of, set_seed
from sparse_decode_cases import DEVICE, DTYPE
from torch import Tensor

from model1.ops.engram import engram_gate, engram_hash, quantize_rows
from model1.ops.engram.gather import gather_rows
from model1.ops.mhc import mhc_coefficients, mhc_collapse, mhc_head, mhc_write_back
from model1.ops.mhc.chain import mhc_collapse_norm, mhc_enter, mhc_seam
from model1.ops.mhc.single_pass import mhc_write_back_collapse_norm

BIG = DEVICE == "cuda"


def _engram_gate_tensors(seed: int) -> dict[str, Tensor]:
    set_seed(seed)
    n, d = (4, 4096) if BIG else (3, 40)
    h, key, value = (torch.randn(5, *x, d).to(DEVICE, DTYPE) for x in ((n,), (n,), ()))
    return {"h": h, "key": key, "value": value, "norm_weight": torch.rand(n, d).to(DEVICE) + 0.5}


def _engram_gate(seed: int) -> Call:
    arguments = _engram_gate_tensors(seed) | {"eps": 1e-6}
    return call_of(engram_gate, arguments, "h", "key", "value", "norm_weight")


def _engram_gate_backward(seed: int) -> Call:
    tensors = _engram_gate_tensors(seed)
    out, gate, scores = torch.ops.model1.engram_gate(*tensors.values(), None, 1e-6, True, "triton")
    grads = {"grad": torch.randn(out.shape).to(out), "d_gate": torch.randn(gate.shape).to(gate)}

    def run(**tensors: Tensor) -> Any:
        return torch.ops.model1.engram_gate_backward(*tensors.values(), True, "triton")

    return Call(run=run, tensors=grads | tensors | {"gate": gate, "scores": scores})


def _engram_gather(seed: int) -> Call:
    """Rows of every kind, all of their tables: others are NaN, which nothing is equal to."""
    set_seed(seed)
    stores = [quantize_rows(torch.randn(20, 256), kind) for kind in ("bf16", "fp8", "fp4")]
    rows = torch.randint(20, (3, 7))
    parts = [x for store in stores for x in (store.data, store.scale) if x is not None]
    names = ("data_0", "data_1", "scale_1", "data_2", "scale_2")
    tensors = dict(zip(names, (x.to(DEVICE) for x in parts), strict=True))

    def run(rows: Tensor, **tables: Tensor) -> tuple[Tensor, ...]:
        pairs = [(tables[f"data_{i}"], tables.get(f"scale_{i}")) for i in range(3)]
        return tuple(
            gather_rows(data, scale, rows.flatten(), dtype=DTYPE, backend="triton")
            for data, scale in pairs
        )

    return Call(run=run, tensors={"rows": rows.to(DEVICE)} | tensors)


def _engram_hash(seed: int) -> Call:
    set_seed(seed)
    numbers = {
        "ngram_token_ids": torch.randint(-1, 50, (9, 4)),
        "compression_table": torch.randint(0, 40, (50,)),
        "multipliers": torch.randint(1, 2**56, (4,)),
        "table_sizes": torch.randint(100, 2**24, (24,)),
        "table_offsets": torch.randint(0, 2**40, (24,)),
    }
    tensors = {name: x.to(DEVICE) for name, x in numbers.items()}
    return call_of(engram_hash, tensors | {"pad_token_id": 2})


def _mhc_tensors(seed: int) -> dict[str, Tensor]:
    set_seed(seed)
    t, n, c = 5, 4, 4096 if BIG else 64
    tensors = {
        "x": torch.randn(t, n, c).to(DTYPE), "phi": torch.randn(24, n * c) * (n * c) ** -0.5,
        "scale": torch.rand(24), "bias": torch.randn(24), "y": torch.randn(t, c).to(DTYPE),
        "post": torch.rand(t, n), "comb": torch.rand(t, n, n), "weight": torch.rand(c),
    }  # fmt: skip
    return {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def _entered(**arguments: Any) -> tuple[Tensor, ...]:
    x, *start = mhc_enter(**arguments)
    return *start, x  # first what depends on every argument


def _mhc(function: Callable[..., Any], names: str, **options: Any) -> Callable[[int], Call]:
    def build(seed: int) -> Call:
        tensors = _mhc_tensors(seed)
        tensors |= {"pre": tensors["post"]}
        if function is mhc_head:
            sizes = {"phi": 4, "scale": 1, "bias": 4}
            tensors |= {name: tensors[name][:size] for name, size in sizes.items()}
        arguments = {name: tensors[name] for name in names.split()}
        return call_of(function, arguments | options, *names.split())

    return build


MEMORY_CALLS: dict[str, Callable[[int], Call]] = {
    "engram_gate": _engram_gate,
    "engram_gate_backward": _engram_gate_backward,
    "engram_gather": _engram_gather,
    "engram_hash": _engram_hash,
    "mhc_coefficients": _mhc(
        mhc_coefficients, "x phi scale bias", iters=20, eps=1e-6, norm_eps=1e-6
    ),
    "mhc_collapse": _mhc(mhc_collapse, "x pre"),
    "mhc_head": _mhc(mhc_head, "x phi scale bias", eps=1e-6, norm_eps=1e-6),
    "mhc_write_back": _mhc(mhc_write_back, "x y post comb"),
    "mhc_collapse_norm": _mhc(mhc_collapse_norm, "x pre weight", norm_eps=1e-6),
    "mhc_write_back_collapse_norm": _mhc(
        mhc_write_back_collapse_norm, "x y post comb pre weight", norm_eps=1e-6
    ),
    "mhc_enter": _mhc(
        _entered, "x phi scale bias weight", iters=20, eps=1e-6, norm_eps=1e-6
    ),
    "mhc_seam": _mhc(
        mhc_seam, "x y post comb phi scale bias weight", iters=20, eps=1e-6, norm_eps=1e-6
    ),
}  # fmt: skip
