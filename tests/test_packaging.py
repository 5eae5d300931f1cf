"""What a user gets from `pip install`: a wheel with every module, and no GPU or hub packages."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from line_budget import ROOT, python_files

NOT_BY_DEFAULT = re.compile(r"^(nvidia|cuda|triton|transformers|openai|pytest)", re.IGNORECASE)
BELONGS_TO = {"pydantic_core": "pydantic"}  # imports from a distribution of another name
IN_AN_EXTRA = {"matplotlib", "openai", "triton"}
NOT_IN_LOCK = re.compile(r"^(nvidia|cuda|transformers)", re.IGNORECASE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def read(wheel: zipfile.ZipFile, name: str) -> str:
    (member,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(member).decode()


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(read(wheel, "METADATA"))


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {n for n in wheel.namelist() if ".dist-info/" not in n}
    assert {str(p.relative_to(ROOT)) for p in python_files("model1")} <= names
    assert "model1/py.typed" in names
    assert {Path(n).parts[0] for n in names} == {"model1"}


def test_metadata_names_the_distribution(metadata: Message) -> None:
    assert metadata["Name"] == "model1-llm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata["Requires-Python"].split(",")) == {">=3.11", "<3.14"}
    assert {"serve", "gpu", "hf", "eval", "dev"} <= set(metadata.get_all("Provides-Extra", []))


def test_default_install_is_small(metadata: Message) -> None:
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert any(r.startswith("fastapi") for r in required)  # the server is part of it
    assert [r for r in required if NOT_BY_DEFAULT.match(r)] == []


def test_every_import_is_declared(metadata: Message) -> None:
    required = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    declared = {re.split(r"[^\w-]", r)[0] for r in required} | IN_AN_EXTRA | {"model1"}
    declared |= set(sys.stdlib_module_names)
    found = {BELONGS_TO.get(name, name) for path in python_files("model1") for name in roots(path)}
    assert found - declared == set()


def roots(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, at any depth."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.partition(".")[0] for name in names}


def test_console_script_points_at_a_function(wheel: zipfile.ZipFile) -> None:
    match = re.search(r"^model1 = ([\w.]+):(\w+)$", read(wheel, "entry_points.txt"), re.MULTILINE)
    assert match is not None
    assert callable(getattr(importlib.import_module(match[1]), match[2]))


def locked() -> list[str]:
    """Name, version and marker of every locked package."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith((" ", "#"))]


def test_lock_has_no_gpu_and_hub_packages() -> None:
    assert len(locked()) > 40
    assert all("==" in line for line in locked())
    assert [line for line in locked() if NOT_IN_LOCK.match(line)] == []


def test_lock_pairs_triton_with_a_numpy_that_its_interpreter_can_use() -> None:
    (triton,) = (line for line in locked() if line.startswith("triton"))
    assert triton == "triton==3.6.0 ; platform_machine == 'x86_64' and sys_platform == 'linux'"
    (numpy,) = (line for line in locked() if line.startswith("numpy"))
    assert re.fullmatch(r"numpy==2\.[0-3]\.\d+", numpy)


@pytest.mark.parametrize(
    ("target", "installs"), [("demo", 0), ("serve", 0), ("check", 1), ("test", 1)]
)
def test_only_checks_and_tests_install_triton(target: str, installs: int, tmp_path: Path) -> None:
    command = ["make", "--dry-run", target, f"VENV={tmp_path}"]
    plan = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert plan.count("grep -v '^triton==' requirements.lock") == 1
    assert plan.count("grep '^triton==' requirements.lock") == installs


def test_lock_covers_every_declared_dependency(metadata: Message) -> None:
    names = {line.partition("==")[0] for line in locked()}
    declared = {
        re.split(r"[^\w.-]", r)[0].lower()
        for r in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in r or "extra == 'dev'" in r
    }
    assert declared - {"model1-llm"} <= names
