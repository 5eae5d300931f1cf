"""Every installed backend plug-in against the references, and always the one of examples/.

Install a plug-in and run this file: its operators get the inputs below, on a device of the type
that it claims, else on the CPU, with NaN in the memory that they may not use.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from line_budget import ROOT, is_triton_file, python_files
from lowrank_cases import CHOICE, SCAN, Shape, make_arguments
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops import backend as dispatch
from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    gather_rope,
    quantize_and_store,
)
from model1.ops.kv_write import norm_rope_store
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.mha_prefill import mha_prefill
from model1.ops.paged_decode import paged_decode
from model1.ops.rope import Rotation, rope_frequencies, rotation
from model1.ops.rope_gate import inverse_rope_gate
from model1.ops.selector import lightning_topk, lowrank_topk
from model1.ops.sparse_decode import sparse_decode
from model1.ops.sparse_prefill import sparse_prefill
from model1.testing.compare import assert_close_rows

EXAMPLE = ROOT / "examples" / "example_backend"
MANUAL = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
PLUG_INS = {point.name for point in entry_points(group=dispatch.ENTRY_POINT_GROUP)} | {"example"}
LAYOUTS = [KVLayout("model1_fp8", 64, 32), KVLayout("v32_fp8", 128, 32), KVLayout("bf16", 40, 8)]
BLOCK_SIZE, NUM_BLOCKS = 4, 6
Case = Callable[[str, str], list[Tensor]]  # of a backend and a device


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The example's wheel, unpacked in a folder where Python looks: what an installer does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=EXAMPLE, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    sys.path.insert(0, str(folder))
    forget_plug_ins()
    yield folder
    sys.path.remove(str(folder))
    forget_plug_ins()


def forget_plug_ins() -> None:
    importlib.invalidate_caches()
    dispatch.plug_ins.cache_clear()
    dispatch._resolve.cache_clear()


def operator_names() -> set[str]:
    """Every operator of the library."""
    names = set()
    for path in python_files("model1/ops"):
        if not is_triton_file(path):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            names |= {x.name for x in vars(module).values() if isinstance(x, dispatch.Operator)}
    return names


def random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape).to(device)


def filled_cache(layout: KVLayout, device: str) -> tuple[Tensor, Tensor]:
    """A cache with 18 written slots, NaN elsewhere, and those slots."""
    cache = allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE, layout, "cpu").fill_(0xFF)
    slots = torch.randperm(NUM_BLOCKS * BLOCK_SIZE)[:18]
    kv = torch.randn(18, layout.d)
    options = {"layout": layout, "block_size": BLOCK_SIZE}
    quantize_and_store(kv, cache, slots, **options, backend="ref")
    return cache.to(device), slots.int().to(device)


def angles(t: int, d_rope: int, device: str) -> Rotation:
    positions = torch.randint(0, 1000, (t,), device=device)
    return rotation(positions, rope_frequencies(d_rope, 10000.0).to(device))


def gathered(backend: str, device: str) -> list[Tensor]:
    results = []
    for layout in LAYOUTS:
        cache, slots = filled_cache(layout, device)
        slots[3:5] = -1
        options = {"layout": layout, "block_size": BLOCK_SIZE, "backend": backend}
        results.append(gather_and_dequantize(cache, slots.view(3, 6), **options))
    return results


def gathered_rope(backend: str, device: str) -> list[Tensor]:
    results = []
    for layout in LAYOUTS:
        cache, slots = filled_cache(layout, device)
        slots[3:5] = -1
        options = {"layout": layout, "block_size": BLOCK_SIZE, "backend": backend}
        results.append(gather_rope(cache, slots, dtype=torch.bfloat16, **options))
    return results


def stored(backend: str, device: str) -> list[Tensor]:
    caches = []
    for layout in LAYOUTS:
        cache, slots = filled_cache(layout, device)
        slots[3:5] = -1
        kv = random(18, layout.d, device=device)
        if layout.is_fp8:  # the bits of a NaN are fixed there alone
            kv[5, 3], kv[6, 3] = math.nan, math.inf
        options = {"layout": layout, "block_size": BLOCK_SIZE, "backend": backend}
        quantize_and_store(kv, cache, slots, **options)
        caches.append(cache)
    return caches


def normalised_and_stored(backend: str, device: str) -> list[Tensor]:
    results = []
    for layout in LAYOUTS:
        cache, slots = filled_cache(layout, device)
        slots[3:5] = -1
        kv, weight = random(18, layout.d, device=device), random(layout.d_nope, device=device)
        latents = norm_rope_store(
            kv, weight, angles(18, layout.d_rope, device), cache, slots,
            layout=layout, block_size=BLOCK_SIZE, eps=1e-6, norm_width=layout.d_nope,
            backend=backend,
        )  # fmt: skip
        read = gather_and_dequantize(
            cache, slots, layout=layout, block_size=BLOCK_SIZE, backend="ref"
        )
        results += [latents, read]
    return results


def gated(backend: str, device: str) -> list[Tensor]:
    """Forward and backward."""
    out = random(7, 3, 24, device=device).requires_grad_()
    gate = random(7, 3, device=device).requires_grad_()
    result = inverse_rope_gate(out, angles(7, 8, device), gate, d_rope=8, backend=backend)
    grads = torch.autograd.grad(result, [out, gate], random(*result.shape, device=device))
    return [result, *grads]


def decoded_sparsely(backend: str, device: str) -> list[Tensor]:
    results = []
    for layout in LAYOUTS:
        (cache, slots), (extra, extra_slots) = (filled_cache(layout, device) for _ in range(2))
        indices, extra_indices = slots.view(3, 2, 3), extra_slots[:12].view(3, 2, 2).clone()
        extra_indices[1, 0, 0] = -1
        extra_indices[2] = -1
        sink = torch.tensor([0.5, math.inf, -math.inf], device=device)
        lengths = torch.tensor([2, 3, 0], dtype=torch.int32, device=device)
        q = random(3, 2, 3, layout.d, device=device)
        for options in (
            {},
            {"topk_length": lengths, "attn_sink": sink},
            {
                "topk_length": lengths, "attn_sink": sink, "extra_kv_cache": extra,
                "extra_topk_indices": extra_indices, "extra_block_size": BLOCK_SIZE,
            },
        ):  # fmt: skip
            results += sparse_decode(
                q, cache, indices, layout=layout, block_size=BLOCK_SIZE, value_dim=layout.d_nope,
                softmax_scale=0.2, empty_lse=math.inf, backend=backend, **options,
            )  # fmt: skip
    return results


def decoded_densely(backend: str, device: str) -> list[Tensor]:
    table = torch.tensor([[0, 3, 99], [5, 99, 99]], dtype=torch.int32, device=device)
    lengths = torch.tensor([7, 0], dtype=torch.int32, device=device)
    plain = random(NUM_BLOCKS, BLOCK_SIZE, 2, 24, device=device)
    plain[3, 3] = plain[5] = math.nan
    results = list(
        paged_decode(
            random(2, 3, 4, 24, device=device), plain, table, lengths,
            value_dim=16, softmax_scale=0.2, causal=True, backend=backend,
        )
    )  # fmt: skip
    for layout in LAYOUTS:
        cache = allocate_kv_cache(NUM_BLOCKS, BLOCK_SIZE, layout, "cpu").fill_(0xFF)
        options = {"layout": layout, "block_size": BLOCK_SIZE}
        slots = torch.tensor([0, 1, 2, 3, 12, 13, 14])
        quantize_and_store(torch.randn(7, layout.d), cache, slots, **options, backend="ref")
        q = random(2, 1, 3, layout.d, device=device)
        sizes = {"value_dim": layout.d_nope, "softmax_scale": 0.2}
        results += paged_decode(
            q, cache.to(device), table, lengths, **sizes, **options, backend=backend
        )
    return results


def attended(backend: str, device: str) -> list[Tensor]:
    """Ragged prefill with grouped heads and an empty request, forward and backward."""
    shapes = ((9, 4, 24), (11, 2, 24), (11, 2, 16))
    q, k, v = (random(*shape, device=device).requires_grad_() for shape in shapes)
    cu_q = torch.tensor([0, 3, 3, 9], dtype=torch.int32, device=device)
    cu_k = torch.tensor([0, 2, 7, 11], dtype=torch.int32, device=device)
    out, lse = mha_prefill(
        q, k, v, cu_q, cu_k, 6, 5, softmax_scale=0.2, causal=True, backend=backend
    )
    grads = torch.autograd.grad(out, [q, k, v], random(*out.shape, device=device))
    return [out, lse, *grads]


def attended_sparsely(backend: str, device: str) -> list[Tensor]:
    """Forward and backward; lists with garbage, a query without keys, a row of NaN nobody names."""
    q, kv = random(5, 3, 32, device=device), random(9, 32, device=device)
    kv[8] = math.nan
    indices = torch.randint(-3, 8, (5, 6)).to(device, torch.int32)
    indices[1, 2], indices[3] = 2**31 - 1, -1
    lengths = torch.tensor([6, 6, 3, 6, 0], dtype=torch.int32, device=device)
    sink = torch.tensor([0.5, -math.inf, -1.0], device=device)
    inputs = [x.requires_grad_() for x in (q, kv, sink)]
    out, max_logits, lse = sparse_prefill(
        q, kv, indices, value_dim=16, softmax_scale=0.2, topk_length=lengths, attn_sink=sink,
        empty_lse=math.inf, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(out, inputs, random(*out.shape, device=device))
    return [out, max_logits, lse, *grads]


def attended_in_part(backend: str, device: str) -> list[Tensor]:
    """Selector, remainder and their composite; ragged requests, rows that see nothing."""
    results = []
    for layout in LAYOUTS[1:]:
        arguments = make_arguments(Shape(layout=layout, has_sink=True), dtype=torch.float32)
        arguments = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in arguments.items()}
        results += lowrank_attention(**arguments, backend=backend)
        scan = {name: arguments[name] for name in SCAN if name != "scan_q"}
        scan["scan_q"] = random(3, 3, 16 + layout.d_rope, device=device)
        chosen, lse = lowrank_topk(**scan, backend=backend)
        rest = {name: scan[name] for name in scan if name not in CHOICE}
        results += [chosen, lse]
        results += lowrank_remainder(
            **rest, core_indices=chosen, rotary_value=True, backend=backend
        )
    return results


def chosen_by_lightning(backend: str, device: str) -> list[Tensor]:
    shape = Shape(layout=LAYOUTS[2])
    arguments = make_arguments(shape)
    rows = ("block_table", "cu_seqlens_q", "max_seqlen_q", "key_end", "max_seqlen", "block_size")
    call = {name: arguments[name] for name in rows}
    call = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in call.items()}
    num_slots = len(arguments["index_cache"])
    keys, q = random(num_slots, 24, device=device), random(3, 2, 24, device=device)
    chosen = lightning_topk(
        q.to(torch.float8_e4m3fn), random(3, 2, device=device),
        keys.to(torch.float8_e4m3fn).view(torch.uint8), random(num_slots, device=device).abs(),
        **call, topk=7, backend=backend,
    )  # fmt: skip
    return [chosen]


CASES: dict[str, Case] = {
    "gather_and_dequantize": gathered,
    "gather_rope": gathered_rope,
    "inverse_rope_gate": gated,
    "inverse_rope_gate_backward": gated,
    "lightning_topk": chosen_by_lightning,
    "lowrank_attention": attended_in_part,
    "lowrank_remainder": attended_in_part,
    "lowrank_topk": attended_in_part,
    "mha_prefill": attended,
    "mha_prefill_backward": attended,
    "norm_rope_store": normalised_and_stored,
    "paged_decode": decoded_densely,
    "quantize_and_store": stored,
    "sparse_decode": decoded_sparsely,
    "sparse_prefill": attended_sparsely,
    "sparse_prefill_backward": attended_sparsely,
}


def test_every_operator_has_a_case_and_the_example_provides_it() -> None:
    assert operator_names() == set(CASES)
    assert set(dispatch.plug_ins()["example"].operators) == set(CASES)


def test_the_manual_lists_every_operator_and_its_contract() -> None:
    rows = re.findall(r"^\| (.*?) \| `(model1/ops/\w+)` \|$", MANUAL, re.MULTILINE)
    assert {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)} == set(CASES)
    assert all((ROOT / folder / "__init__.py").is_file() for _, folder in rows)


def test_the_manuals_snippet_runs(site: Path) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", MANUAL, re.MULTILINE | re.DOTALL)
    path = os.pathsep.join([str(site), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-c", snippet],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout == "tensor(True)\n", result.stderr


def test_the_manual_shows_the_entry_point_of_the_example() -> None:
    (entry,) = re.findall(r"^```toml\n(.*?)^```$", MANUAL, re.MULTILINE | re.DOTALL)
    assert entry in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("operator", CASES)
@pytest.mark.parametrize("name", sorted(PLUG_INS))
def test_plug_in_agrees_with_the_reference(name: str, operator: str) -> None:
    plug_in = dispatch.plug_ins()[name]
    if operator not in plug_in.operators:
        pytest.skip(f"{name} does not provide {operator}")
    device = min(plug_in.device_types, default="cpu")
    torch.manual_seed(1)
    want = CASES[operator]("ref", device)
    torch.manual_seed(1)
    got = CASES[operator](name, device)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        if y.is_floating_point():
            assert_close_rows(x, y, y)
        else:
            assert torch.equal(x, y)


def test_the_plug_in_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise NotImplementedError("the plug-in was called")

    monkeypatch.setitem(dispatch.plug_ins()["example"].operators, "sparse_decode", refuse)
    with pytest.raises(NotImplementedError, match="the plug-in was called"):
        decoded_sparsely("example", "cpu")
    decoded_sparsely("ref", "cpu")


def test_a_name_that_is_not_installed_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"auto, ref, triton, .*example.*, got 'exmaple'"):
        decoded_sparsely("exmaple", "cpu")
