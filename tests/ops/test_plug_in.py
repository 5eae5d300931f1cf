"""Backend plug-ins: the operators' own tests on the example, and calls for every installed one.

Install a plug-in and run this file: the operators of CASES get the inputs below, on a device of the
type that the plug-in claims, else on the CPU, with NaN in the memory that they may not use.
docs/backends.md says how to run the operators' own tests on it.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from backend_option import moving, operator_names, use_backend
from call_cases_loss import learned
from example_site import EXAMPLE, installed_example
from line_budget import ROOT
from lowrank_cases import CHOICE, SCAN, Shape, make_arguments
from plug_in_cases import left, mixed, mixed_in_a_row, mixed_in_one_pass, random
from torch import Tensor

from model1.errors import BackendUnavailable
from model1.ops import backend as dispatch
from model1.ops.activation import swiglu
from model1.ops.engram import engram_causal_conv
from model1.ops.kv_cache import (
    KVLayout,
    allocate_kv_cache,
    gather_and_dequantize,
    quantize_and_store,
)
from model1.ops.kv_write import norm_rope_store
from model1.ops.lowrank_attention import lowrank_attention
from model1.ops.lowrank_remainder import lowrank_remainder
from model1.ops.mha_prefill import mha_prefill
from model1.ops.norm import add_rms_norm, rms_norm
from model1.ops.rope import (
    Rotation,
    norm_rotate_tail,
    rope_frequencies,
    rotate_tail,
    rotation,
)
from model1.ops.rope_gate import inverse_rope_gate
from model1.ops.selector import lowrank_topk
from model1.ops.sparse_decode import sparse_decode
from model1.ops.sparse_prefill import sparse_prefill
from model1.testing.compare import assert_close_rows

MANUAL = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
PLUG_INS = {point.name for point in entry_points(group=dispatch.ENTRY_POINT_GROUP)} | {"example"}
LAYOUTS = [KVLayout("model1_fp8", 64, 32), KVLayout("v32_fp8", 128, 32), KVLayout("bf16", 40, 8)]
BLOCK_SIZE, NUM_BLOCKS = 4, 6
# The operators' own tests; what follows says nothing of a backend: errors, PyTorch's view of the
# operators and the gradients of references in fp64.
SUITE = [
    f"tests/ops/test_{name}.py"
    for name in (
        "kv_cache", "kv_write", "lightning", "lowrank_attention", "mha_prefill", "paged_decode",
        "rope_gate", "sparse_decode", "sparse_prefill",
    )
]  # fmt: skip
NOT_OF_A_BACKEND = (
    "not wrong and not refused and not opcheck and not describe and not graph"
    " and not finite_differences"
)
Case = Callable[[str, str], list[Tensor]]  # of a backend and a device


@pytest.fixture(scope="module", autouse=True)
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    with installed_example(folder):
        yield folder


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


def small_steps(backend: str, device: str) -> list[Tensor]:
    """Norm, rotation and activation, forward and backward."""
    x, y, both = (random(5, n, 8, device=device).requires_grad_() for n in (3, 3, 6))
    weight = random(8, device=device).requires_grad_()
    turn = angles(5, 4, device)
    out, total = add_rms_norm(x, y, weight, 1e-6, backend=backend)
    turned = rotate_tail(2 * total, turn, inverse=True, backend=backend)
    normed = norm_rotate_tail(2 * total, turn, norm_eps=1e-6, backend=backend)
    gated = swiglu(out, rms_norm(y, None, 1e-6, backend=backend), 0.5, backend=backend)
    results = [out, total, turned, normed, gated, swiglu(both, None, None, backend=backend)]
    grads = [random(*result.shape, device=device) for result in results]
    return [*results, *torch.autograd.grad(results, [x, y, weight, both], grads)]


def convolved(backend: str, device: str) -> list[Tensor]:
    """Two documents, forward and backward."""
    leaves = [random(*shape, device=device).requires_grad_() for shape in ((7, 8), (8, 3), (2, 4))]
    x, weight, norm_weight = leaves
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2], device=device)
    out = engram_causal_conv(
        x, positions, weight, norm_weight, dilation=2, eps=1e-5, backend=backend
    )
    return [out, *torch.autograd.grad(out, leaves, random(7, 8, device=device))]


SMALL = (
    "norm_rotate_tail_backward", "rms_norm", "rms_norm_backward", "rotate_tail", "swiglu",
    "swiglu_backward",
)  # fmt: skip


MHC = [f"mhc_{x}{y}" for x in ("coefficients", "collapse", "write_back") for y in ("", "_backward")]
CHAIN = [f"mhc_{x}{y}" for x in ("collapse_norm", "enter", "seam") for y in ("", "_backward")]
# What the operators' own tests check only of kernels: gradients, quantised stores, long calls. The
# other operators are tested by those alone.
CASES: dict[str, Case] = (
    dict.fromkeys(MHC, mixed)
    | dict.fromkeys(SMALL, small_steps)
    | dict.fromkeys(CHAIN, mixed_in_a_row)
    | {
        "engram_causal_conv": convolved,
        "engram_causal_conv_backward": convolved,
        "inverse_rope_gate": gated,
        "inverse_rope_gate_backward": gated,
        "linear_cross_entropy": learned,
        "mhc_head": left,
        "mhc_head_backward": left,
        "mhc_write_back_collapse_norm": mixed_in_one_pass,
        "mhc_write_back_collapse_norm_backward": mixed_in_one_pass,
        "lowrank_attention": attended_in_part,
        "lowrank_remainder": attended_in_part,
        "lowrank_topk": attended_in_part,
        "mha_prefill": attended,
        "mha_prefill_backward": attended,
        "norm_rope_store": normalised_and_stored,
        "sparse_decode": decoded_sparsely,
        "sparse_prefill": attended_sparsely,
        "sparse_prefill_backward": attended_sparsely,
    }
)


def test_the_example_provides_every_operator() -> None:
    assert set(dispatch.plug_ins()["example"].operators) == operator_names()


def test_the_manual_lists_every_operator_and_its_contract() -> None:
    rows = re.findall(r"^\| (.*?) \| `(model1/ops/\w+)` \|$", MANUAL, re.MULTILINE)
    assert {name for names, _ in rows for name in re.findall(r"`(\w+)`", names)} == operator_names()
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


def run_suite(site: Path, *files: str) -> subprocess.CompletedProcess[str]:
    """The operators' own tests on the example that lies in `site`."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--backend=example"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])}
    return subprocess.run(
        [*command, "-k", NOT_OF_A_BACKEND, *files],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_operators_own_tests_pass_on_the_example(site: Path) -> None:
    result = run_suite(site, *SUITE)
    assert result.returncode == 0, result.stdout
    assert "operators that it lacks, on auto: none" in result.stdout
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout
    assert int(passed[1]) > 150


@pytest.mark.slow
def test_the_operators_own_tests_find_a_broken_plug_in(site: Path, tmp_path: Path) -> None:
    """Its functions are what those tests call, and an operator that it lacks is named."""
    shutil.copytree(site, tmp_path, dirs_exist_ok=True)
    module = tmp_path / "model1_example_backend.py"
    broken = """
example_decode = sparse_decode

def sparse_decode(*args, **options):
    out, lse = example_decode(*args, **options)
    return out + 1, lse

operators["sparse_decode"] = sparse_decode
del operators["paged_decode"]
"""
    module.write_text(module.read_text(encoding="utf-8") + broken, encoding="utf-8")
    name = "tests/ops/test_sparse_decode.py::test_hostile_calls_are_right"
    result = run_suite(tmp_path, name)
    assert "operators that it lacks, on auto: paged_decode\n" in result.stdout
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    assert f"FAILED {name}" in result.stdout


def test_a_backend_that_is_not_installed_cannot_be_tested() -> None:
    with pytest.raises(pytest.UsageError, match="--backend exmaple: no such plug-in"):
        use_backend("exmaple")


def test_tensors_move_to_a_plug_ins_device_and_back() -> None:
    def double(x: Tensor, *, factor: Tensor) -> Tensor:
        seen.append(x)
        x *= 2
        return x * factor

    seen: list[Tensor] = []
    run = moving({"double": double}, torch.device("cpu"))["double"]
    whole = torch.tensor([math.nan, 1.0, math.nan, 2.0, math.nan])
    result = run(whole[1::2], factor=torch.tensor(3.0))
    assert result.tolist() == [6.0, 12.0]
    assert whole[1::2].tolist() == [2.0, 4.0]
    assert whole[::2].isnan().all()
    assert seen[0].data_ptr() != whole[1::2].data_ptr()
    assert seen[0].stride() == (2,)


def test_the_plug_in_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the plug-in was called")

    monkeypatch.setitem(dispatch.plug_ins()["example"].operators, "sparse_decode", refuse)
    with pytest.raises(RuntimeError, match="the plug-in was called"):
        decoded_sparsely("example", "cpu")
    decoded_sparsely("ref", "cpu")


def test_a_name_that_is_not_installed_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"auto, ref, triton, .*example.*, got 'exmaple'"):
        decoded_sparsely("exmaple", "cpu")
