"""Every shipped Triton kernel compiles for every GPU we support, and docs/ says what it takes."""

from __future__ import annotations

import ast
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
from line_budget import ROOT, is_triton_file, python_files

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.compile_cases import CompileCase
from model1.testing.compile import (
    MODULES,
    TARGETS,
    Resources,
    is_trap,
    main,
    markdown,
    shipped_cases,
)
from model1.testing.covering import covering

TABLE = ROOT / "docs" / "kernel_resources.md"
REGENERATE = "run python -m model1.testing.compile --markdown docs/kernel_resources.md"


def rows_of(text: str) -> set[tuple[str, ...]]:
    """The cells of every row of the table in `text`, without the header."""
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return {tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def written_kernels() -> set[str]:
    """Every function under @triton.jit that is launched, by its suffix."""
    return {
        f"{module_name(path)}.{node.name}"
        for path in python_files("model1")
        if is_triton_file(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
        if any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
    }


def test_every_module_that_ships_kernels_is_listed() -> None:
    paths = [path for path in python_files("model1/ops") if is_triton_file(path)]
    found = {module_name(p) for p in paths if "\ndef shipped_kernels(" in p.read_text()}
    assert found == set(MODULES)


def test_every_kernel_is_compiled_for_every_target() -> None:
    for target in TARGETS:
        kernels = [case.kernel for module in MODULES for case in shipped_cases(module, target)]
        assert {f"{k.fn.__module__}.{k.fn.__name__}" for k in kernels} == written_kernels(), target


@pytest.mark.parametrize("module", MODULES)
def test_names_tell_the_cases_of_a_module_apart(module: str) -> None:
    for target in TARGETS:
        names = [case.name for case in shipped_cases(module, target)]
        assert len(set(names)) == len(names) > 0
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
    """It was written by a run that compiled everything for every target and found no problem."""
    # the interpreter, which the other tests use, multiplies in other types
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", "from model1.testing.compile import digest; print(digest())"]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert f"`{result.stdout.strip()}`" in TABLE.read_text(encoding="utf-8"), REGENERATE


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_90", *(name for name in TARGETS if name != "sm_90")])
def test_kernels_compile_within_the_limits_of(target: str) -> None:
    """Every kernel, for every target: all shipped launches on sm_90, a covering choice elsewhere.

    The choice has each launch configuration (warps, stages, block sizes), each layout, each flag
    and each type at least once, in the largest sizes that have it. What it leaves out are smaller
    sizes and further combinations, some two fifths of the launches. All of them were compiled when
    the table was written, and its digest says that neither kernels nor launches changed since.
    """
    import triton

    # the interpreter, which the other tests use, makes no binaries
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "model1.testing.compile", "--target", target, "--json"]
    command += ["--processes", "1"] + ["--covering"] * (target != "sm_90")
    result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [Resources(**json.loads(line)) for line in result.stdout.splitlines()]
    assert [text for row in rows if (text := row.problem())] == []
    assert len(rows) == sum(
        len(cases) if target == "sm_90" else len(covering(cases))
        for cases in (shipped_cases(module, target) for module in MODULES)
    )
    table = TABLE.read_text(encoding="utf-8")
    if f"Triton {triton.__version__}:" in table:  # another version gives other figures
        assert rows_of(markdown(rows, "")) <= rows_of(table), REGENERATE


@pytest.mark.parametrize("target", TARGETS)
def test_a_covering_choice_has_every_kernel_type_and_configuration(target: str) -> None:
    for module in MODULES:
        cases = shipped_cases(module, target)
        chosen = [cases[i] for i in covering(cases)]
        assert facts_of(chosen) == facts_of(cases)


def facts_of(cases: list[CompileCase]) -> set[object]:
    """Some of what a choice of cases must share with all of them."""
    facts = set[object]()
    for case in cases:
        kernel = case.kernel.fn.__name__
        blocks = {name: x for name, x in case.constexprs.items() if name.startswith("BLOCK_")}
        facts.add((kernel, case.num_warps, case.num_stages, str(blocks)))
        flags = {name: x for name, x in case.constexprs.items() if x is None or type(x) is bool}
        types = {n: x for n, x in case.signature.items() if case.constexprs.get(n, "") == ""}
        facts |= {(kernel, name, str(x)) for name, x in {**flags, **types}.items()}
    return facts


def test_few_cases_cover_and_of_equals_the_largest() -> None:
    def kernel(x_ptr: Any, stride: Any, flag: Any, D: Any, BLOCK_N: Any, PIECES: Any) -> None: ...

    def case(d: int, flag: bool | None = True, block: int = 64, warps: int = 4) -> CompileCase:
        sizes = {"stride": 16 * d, "flag": flag, "D": d, "BLOCK_N": block, "PIECES": ((0, d), (d,))}
        jit = SimpleNamespace(fn=kernel)
        return CompileCase("", jit, {"x_ptr": "*bf16"}, sizes, warps, 2)

    assert covering([]) == []
    assert covering([case(8), case(32), case(16)]) == [1]
    assert covering([case(8), case(8, flag=None), case(8, flag=False)]) == [0, 1, 2]
    assert covering([case(8), case(8, block=32), case(8, flag=None, block=32)]) == [0, 2]
    assert covering([case(8), case(8, warps=8), case(16, warps=8)]) == [0, 2]
    other = replace(case(8), signature={"x_ptr": "*fp32"})
    assert covering([case(8), other]) == [0, 1]


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
        main(["--covering", "--markdown", str(tmp_path / "table.md")])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        main(["--target", "sm_90"])
