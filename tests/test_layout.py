"""What the tree promises: sizes, no machine paths, no unsafe loading, a core that stands alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from line_budget import ROOT, file_limit, is_triton_file, long_functions, python_files, violations

TEXT_SUFFIXES = {".py", ".md", ".toml", ".yaml", ".lock", ".jinja", ".html", ".js", ".css", ""}
MACHINE_PATH = re.compile(r"(?<![\w./:])/(?:tmp|work|home|root|Users|mnt|opt)/\w")
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "torch.load"}
CORE = (
    "config",
    "tokenizer",
    "cache",
    "ops",
    "flash_mla",
    "nn",
    "weights",
    "memory",
    "train",
    "engine",
)

CORE_WITHOUT_EXTRAS = """
import importlib, importlib.machinery, sys
BLOCKED = {"fastapi", "starlette", "pydantic", "typer", "uvicorn", "orjson", "transformers",
           "triton", "rich", "tqdm", "matplotlib", "jinja2", "openai", "pytest"}
find = importlib.machinery.PathFinder.find_spec
# As if not installed, also for code that asks find_spec before it imports.
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, path=None, target=None:
    None if name.partition(".")[0] in BLOCKED else find(name, path, target))
for module in sys.argv[1:]:
    importlib.import_module(module)
assert not BLOCKED & sys.modules.keys(), BLOCKED & sys.modules.keys()
"""

SIDE_EFFECTS = """
import importlib, os, sys, threading, warnings
before = dict(os.environ)
for module in sys.argv[1:]:
    importlib.import_module(module)
import torch
changed = dict(os.environ).items() ^ before.items()
assert not changed, changed
assert threading.active_count() == 1, threading.enumerate()
assert torch.get_default_dtype() == torch.float32
assert not torch.cuda.is_initialized()
"""


def modules(folders: tuple[str, ...]) -> list[str]:
    """Dotted names of the modules in these packages or single files of model1.

    Triton files are left out, so that the rest is imported as without Triton.
    """
    names = []
    for path in python_files("model1"):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if len(parts) > 1 and parts[1] in folders and not is_triton_file(path):
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


def text_files() -> list[Path]:
    folders = ["model1", "tests", "docs", "configs", "tools", "examples", "benchmarks", ".ci"]
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.is_file()]
    found += [p for p in ROOT.iterdir() if p.is_file()]
    return [p for p in found if p.suffix in TEXT_SUFFIXES and "__pycache__" not in p.parts]


def run_python(code: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def unsafe_uses(source: str) -> list[str]:
    """Imports and calls through which a file can run code while it is being read."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in UNSAFE_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] if node.module.partition(".")[0] in UNSAFE_MODULES else []
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in UNSAFE_CALLS:
            found.append(ast.unparse(node.func))
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += [] if ast.unparse(node.value) == "False" else ["allow_pickle"]
    return found


def triton_imports_before_a_skip(path: Path) -> list[str]:
    """Triton files that a test file imports before it has made sure that Triton is there."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if "importorskip('triton'" in ast.unparse(node):
            break
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            files = [ROOT / (name.replace(".", "/") + ".py") for name in names]
            found += [str(file) for file in files if file.exists() and is_triton_file(file)]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] == "triton"]
    return found


def test_files_and_functions_keep_their_limits() -> None:
    assert violations() == []


def test_long_functions_are_found_and_docstrings_are_free(tmp_path: Path) -> None:
    body = "    x = 1\n"
    path = tmp_path / "sample.py"
    path.write_text("def good():\n" + '    """' + "\n" * 30 + '    """\n' + body * 39)
    assert long_functions(path) == []
    path.write_text("def bad():\n" + body * 40)
    assert long_functions(path) == [("bad", 1, 41, 40)]


def test_kernels_have_limits_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "portable.py"
    path.write_text("@triton.jit\ndef _fwd_kernel():\n" + "    x = 1\n" * 149)
    assert long_functions(path) == []
    path.write_text("@triton.jit\ndef _fwd_kernel():\n" + "    x = 1\n" * 150)
    assert long_functions(path) == [("_fwd_kernel", 2, 151, 150)]
    folder = ROOT / "model1" / "ops" / "kv_cache"
    assert [file_limit(folder / name) for name in ("bits.py", "ref.py")] == [400, 300]


def test_launchers_of_kernels_are_triton_files(tmp_path: Path) -> None:
    path = tmp_path / "portable.py"
    path.write_text("import torch\n\nfrom model1.ops.mha_prefill.portable_sizes import Config\n")
    assert not is_triton_file(path)
    path.write_text(
        "import torch\n\nfrom model1.ops.mha_prefill.portable_forward import dot_rows\n"
    )
    assert is_triton_file(path)


def test_no_machine_paths() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import load",
        "torch.load(p)",
        "eval(x)",
        "np.load(p, allow_pickle=True)",
    ],
)
def test_unsafe_uses_are_found(line: str) -> None:
    assert len(unsafe_uses(line)) == 1


def test_nothing_loads_code_from_data() -> None:
    found = {
        str(path.relative_to(ROOT)): uses
        for path in python_files("model1")
        if (uses := unsafe_uses(path.read_text(encoding="utf-8")))
    }
    assert found == {}


def test_core_imports_without_server_and_gpu_libraries() -> None:
    names = modules(CORE)
    assert len(names) > 20
    result = run_python(CORE_WITHOUT_EXTRAS, names)
    assert result.returncode == 0, result.stderr


def test_tests_are_collected_without_triton() -> None:
    found = {path.name: triton_imports_before_a_skip(path) for path in python_files("tests")}
    assert {name: files for name, files in found.items() if files} == {}


def test_an_import_of_triton_that_nothing_guards_is_found(tmp_path: Path) -> None:
    path = tmp_path / "test_sample.py"
    bad = "from model1.ops.mha_prefill import portable\n"
    path.write_text("import pytest\n" + bad + "import triton.language as tl\n")
    assert len(triton_imports_before_a_skip(path)) == 2
    path.write_text("import pytest\npytest.importorskip('triton', reason='x')\n" + bad)
    assert triton_imports_before_a_skip(path) == []


def test_importing_every_module_has_no_side_effects() -> None:
    names = modules((*CORE, "serve", "evals", "cli", "testing", "presets", "errors"))
    result = run_python(SIDE_EFFECTS, names)
    assert result.returncode == 0, result.stderr


def test_every_test_folder_mirrors_a_package() -> None:
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    packages = {p.name for p in (ROOT / "model1").iterdir() if p.is_dir()}
    # Benchmarks are tested like the library, beside which they lie.
    assert folders - {"golden", "benchmarks"} <= packages
