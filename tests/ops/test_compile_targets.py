"""Every shipped Triton kernel compiles for every GPU we support, and docs/ says what it takes."""

from __future__ import annotations

import ast
import collections
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from line_budget import ROOT, is_triton_file, python_files

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import max_channels
from model1.testing.compile import (
    Resources,
    is_trap,
    kept_lines,
    lines_by_module,
    main,
    markdown,
)
from model1.testing.shipped import MODULES, digest, kernel_files, largest, shipped_cases
from model1.testing.targets import TARGETS

TABLE = ROOT / "docs" / "kernel_resources.md"
REGENERATE = "run python -m model1.testing.compile --markdown docs/kernel_resources.md"


def rows_of(text: str) -> set[tuple[str, ...]]:
    """The cells of every row of the table in `text`, without the header."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def is_hopper_tier(path: Path) -> bool:
    """Whether a module is imported by the Hopper tier alone, and launched on sm_90 alone."""
    return path.parent.name == "hopper" or path.stem.startswith("hopper")


def written_kernels(target: str) -> set[str]:
    """Every function under @triton.jit or @gluon.jit that is launched there, by its suffix."""
    return {
        f"{module_name(path)}.{node.name}"
        for path in python_files("model1")
        if is_triton_file(path) and (target == "sm_90" or not is_hopper_tier(path))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(
            ast.unparse(decorator).startswith(("triton.jit", "gluon.jit"))
            for decorator in node.decorator_list
        )
    }


def test_every_module_that_ships_kernels_is_listed() -> None:
    paths = [path for path in python_files("model1/ops") if is_triton_file(path)]
    found = {module_name(p) for p in paths if "\ndef shipped_kernels(" in p.read_text()}
    assert found == set(MODULES)


def test_every_kernel_is_compiled_for_every_target() -> None:
    for target in TARGETS:
        kernels = [case.kernel for module in MODULES for case in shipped_cases(module, target)]
        names = {f"{k.fn.__module__}.{k.fn.__name__}" for k in kernels}
        assert names == written_kernels(target), target


@pytest.mark.parametrize("module", MODULES)
def test_names_tell_the_cases_of_a_module_apart(module: str) -> None:
    for target in TARGETS:
        names = [case.name for case in shipped_cases(module, target)]
        assert len(set(names)) == len(names)
        assert names or (".hopper" in module and target != "sm_90")
        assert not any("|" in name for name in names)


def test_the_table_has_a_row_for_every_kernel_and_target() -> None:
    shipped = {
        (module.removeprefix("model1.ops."), case.name, target)
        for module in MODULES
        for target in TARGETS
        for case in shipped_cases(module, target)
    }
    rows = rows_of(TABLE.read_text(encoding="utf-8"))
    assert {row[:3] for row in rows} == shipped, REGENERATE


def test_the_table_is_of_the_locked_triton() -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = re.search(r"^triton==(\S+)", lock, re.MULTILINE)
    assert locked is not None
    assert f"Triton {locked[1]}:" in TABLE.read_text(encoding="utf-8"), REGENERATE


def test_the_table_is_of_these_kernels() -> None:
    """It was written by runs that compiled everything for every target and found no problem."""
    # the interpreter, which the other tests use, multiplies in other types
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    code = "from model1.testing.compile import *; print(*map(digest_line, MODULES), sep='\\n')"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    assert set(result.stdout.splitlines()) == {x for x in lines if x.startswith("- ")}, REGENERATE


def test_only_changed_modules_lose_their_lines(tmp_path: Path) -> None:
    lines = {module: [f"| {module.removeprefix('model1.ops.')} | x |"] for module in MODULES}
    table = tmp_path / "table.md"
    assert kept_lines(table) == {}
    text = markdown(lines)
    table.write_text(text, encoding="utf-8")
    assert kept_lines(table) == lines
    changed = MODULES[3]
    table.write_text(text.replace(digest(changed), "0" * 16), encoding="utf-8")
    assert kept_lines(table) == {name: x for name, x in lines.items() if name != changed}
    table.write_text(text.replace("Triton 3", "Triton 2"), encoding="utf-8")
    assert kept_lines(table) == {}


def test_a_digest_covers_the_kernels_that_a_module_imports() -> None:
    module = "model1.ops.sparse_decode.portable"
    names = {path.name for path in kernel_files(module)}
    assert {"portable.py", "portable_kernel.py", "portable_row.py", "online_softmax.py"} <= names
    assert not any(name.startswith("hopper") for name in names)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("targets", [list(TARGETS)[:4], list(TARGETS)[4:]], ids=" ".join)
def test_kernels_compile_within_the_limits_of(targets: list[str]) -> None:
    """Every kernel, for every target, in its largest launch.

    The other launches, three quarters, were compiled when the table was written. Its digest says
    that neither kernels nor launches changed since.
    """
    import triton

    # the interpreter, which the other tests use, makes no binaries
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "model1.testing.compile", "--largest", "--json"]
    command += ["--processes", "1", *(f"--target={target}" for target in targets)]
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [Resources(**json.loads(line)) for line in result.stdout.splitlines()]
    assert [text for row in rows if (text := row.problem())] == []
    compiled = collections.Counter(row.target for row in rows)
    assert compiled == {
        target: sum(len(largest(shipped_cases(module, target))) for module in MODULES)
        for target in targets
    }
    table = TABLE.read_text(encoding="utf-8")
    if f"Triton {triton.__version__}:" in table:  # another version gives other figures
        assert rows_of(markdown(lines_by_module(rows, MODULES))) <= rows_of(table), REGENERATE


def test_every_kernel_has_one_largest_launch() -> None:
    for module, target in itertools.product(MODULES, TARGETS):
        cases = shipped_cases(module, target)
        names = [cases[i].kernel.fn.__name__ for i in largest(cases)]
        assert sorted(names) == sorted({case.kernel.fn.__name__ for case in cases})


def test_the_largest_launch_has_the_largest_sizes() -> None:
    def kernel(x_ptr: Any, flag: Any, D: Any, BLOCK_N: Any) -> None: ...

    def case(d: int, block: int, *, flag: bool = False) -> CompileCase:
        sizes = {"flag": flag, "D": d, "BLOCK_N": block}
        return CompileCase("", SimpleNamespace(fn=kernel), {"x_ptr": "*bf16"}, sizes, 4, 2)

    assert largest([]) == []
    assert largest([case(8, 64), case(32, 64, flag=True), case(32, 32)]) == [1]
    assert largest([case(8, 16, flag=True), case(8, 32)]) == [1]


@pytest.mark.slow
def test_a_kernel_without_enough_tensor_memory_is_found() -> None:
    """Triton 3.6 makes a trap of it, without an error."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", GREEDY], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["656", "True"]


GREEDY = """
from dataclasses import replace
from model1.testing import compile

module = "model1.ops.mha_prefill.portable"
cases = {case.name: case for case in compile.shipped_cases(module, "sm_100")}
case = cases["mha_prefill_fwd 512 512"]
sizes = dict(case.constexprs, BLOCK_M=128, BLOCK_N=32)
compile.shipped_cases = lambda *_: [replace(case, constexprs=sizes, num_stages=1)]
row = compile._compile_one((module, "sm_100", 0))
print(row.tensor_columns, row.is_trap)
"""


def test_problems_are_named() -> None:
    row = Resources("sparse_decode.portable", "split", "sm_86", 8, 2, 255, 0, 1000)
    assert row.problem() is None
    assert replace(row, spill_bytes=8).problem() is None
    spilling = replace(row, target="sm_90", spill_bytes=8)
    assert spilling.problem() == "sparse_decode.portable split sm_90: spills 8 bytes"
    greedy = replace(row, shared_bytes=(99 << 10) + 1)
    assert "101377 bytes of shared memory, at most 101376" in (greedy.problem() or "")
    assert "at most 512" in (replace(row, tensor_columns=656, is_trap=True).problem() or "")
    assert (replace(row, is_trap=True).problem() or "").endswith("compiles to a trap")
    assert "does not compile: boom" in (replace(row, error="boom").problem() or "")


def test_a_trap_is_told_from_a_name() -> None:
    body = ".visible .entry trap_kernel(\n)\n{\n$L__func_begin0:\n\t.loc 1 10 0\n"
    assert is_trap(body + "\t// begin inline asm\n\ttrap;\n\t// end inline asm\n\tret;\n}\n")
    assert not is_trap(body + "\tst.global.b32 [%rd1], %r1; // no trap;\n\tret;\n}\n")
    assert not is_trap("")


def test_misuse_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--target", "sm_90", "--markdown", str(tmp_path / "table.md")])
    with pytest.raises(SystemExit):
        main(["--largest", "--markdown", str(tmp_path / "table.md")])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        main(["--target", "sm_90"])


def test_the_widest_rows_follow_from_shared_memory() -> None:
    for arch, widest, widest_fp32 in ((80, 1088, 1088), (89, 1024, 768), (90, 1088, 1088)):
        target = KernelTarget("cuda", arch)
        assert max_channels(target, torch.bfloat16) == widest
        assert max_channels(target, torch.float32) == widest_fp32
    assert max_channels(KernelTarget("hip", "gfx942"), torch.float32) == 1088
