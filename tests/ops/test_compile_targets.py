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

import pytest
from line_budget import ROOT, is_triton_file, python_files

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.testing.compile import (
    MODULES,
    TARGETS,
    Resources,
    digest,
    main,
    markdown,
    shipped_cases,
)

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
    assert f"`{digest()}`" in TABLE.read_text(encoding="utf-8"), REGENERATE


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])  # all eight take twelve minutes of one core
def test_kernels_compile_within_the_limits_of(target: str) -> None:
    import triton

    # the interpreter, which the other tests use, makes no binaries
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "model1.testing.compile", "--target", target, "--json"]
    result = subprocess.run(
        [*command, "--processes", "1"], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rows = [Resources(**json.loads(line)) for line in result.stdout.splitlines()]
    assert [text for row in rows if (text := row.problem())] == []
    table = TABLE.read_text(encoding="utf-8")
    if f"Triton {triton.__version__}:" in table:  # another version gives other figures
        assert rows_of(markdown(rows, "")) <= rows_of(table), REGENERATE


def test_problems_are_named() -> None:
    row = Resources("sparse_decode.portable", "split", "sm_86", 8, 2, 255, 0, 1000)
    assert row.problem() is None
    assert replace(row, spill_bytes=8).problem() is None
    spilling = replace(row, target="sm_90", spill_bytes=8)
    assert spilling.problem() == "sparse_decode.portable split sm_90: spills 8 bytes"
    greedy = replace(row, shared_bytes=(99 << 10) + 1)
    assert "101377 bytes of shared memory, at most 101376" in (greedy.problem() or "")
    assert "does not compile: boom" in (replace(row, error="boom").problem() or "")


def test_misuse_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main(["--target", "sm_90", "--markdown", str(tmp_path / "table.md")])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET must not be set"):
        main(["--target", "sm_90"])
