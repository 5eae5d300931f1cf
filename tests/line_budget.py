"""Line limits of the tree: `make lines` prints the count and fails where a limit is broken.

A file or function over its limit is split; the limits are not raised for it.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY_LINES = 38000  # all of model1/; growth is explained in the change that needs it
FOLDERS = ("model1", "tests", "tools", "examples", "benchmarks")
FILE_LINES = 300
TEST_FILE_LINES = 400
TRITON_FILE_LINES = 400  # a kernel and its launcher stay together
FUNCTION_LINES = 40  # from `def` to the last line, the docstring not counted
KERNEL_LINES = (
    150  # the same for a @triton.jit or @gluon.jit function, which cannot hand over its registers
)
INIT_LINES = 40  # exports only
OP_INIT_LINES = 150  # an operator's contract: docstrings, checks, dispatch


def num_lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def file_limit(path: Path) -> int:
    """The limit of one file, by its place in the tree."""
    parts = path.relative_to(ROOT).parts
    if parts[0] == "tests":
        return TEST_FILE_LINES
    if path.name != "__init__.py":
        return TRITON_FILE_LINES if is_triton_file(path) else FILE_LINES
    return OP_INIT_LINES if parts[1] == "ops" else INIT_LINES


def is_triton_file(path: Path) -> bool:
    """Whether the file is of Triton kernels or launches them: operators import it on first use."""
    text = path.read_text(encoding="utf-8")
    modules = r"model1\.ops\.(?:\w+\.(?:portable|hopper)\w*|hopper\.\w+)"
    kernels = re.findall(rf"^from ({modules}) import", text, re.MULTILINE)
    files = [ROOT / (name.replace(".", "/") + ".py") for name in kernels]
    imports_it = re.search(r"^(?:import|from) triton\b", text, re.MULTILINE) is not None
    return imports_it or any(map(is_triton_file, files))


def function_limit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The limit of one function: kernels in Triton or Gluon and their device functions get more."""
    decorators = [ast.unparse(decorator) for decorator in function.decorator_list]
    is_kernel = any(text.startswith(("triton.jit", "gluon.jit")) for text in decorators)
    return KERNEL_LINES if is_kernel else FUNCTION_LINES


def long_functions(path: Path) -> list[tuple[str, int, int, int]]:
    """Name, first line, length and limit of every function over its limit."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            length -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
        if length > function_limit(node):
            found.append((node.name, node.lineno, length, function_limit(node)))
    return found


def python_files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py"))


def violations() -> list[str]:
    """One line per broken limit; empty when all hold."""
    found = []
    for path in [path for folder in FOLDERS for path in python_files(folder)]:
        where = path.relative_to(ROOT)
        if num_lines(path) > file_limit(path):
            found.append(f"{where}: {num_lines(path)} lines, at most {file_limit(path)}")
        if where.parts[0] != "tests":
            for name, line, length, limit in long_functions(path):
                found.append(f"{where}:{line}: {name} has {length} lines, at most {limit}")
    total = sum(map(num_lines, python_files("model1")))
    if total > LIBRARY_LINES:
        found.append(f"model1/: {total} lines, at most {LIBRARY_LINES}")
    return found


def main() -> int:
    """Print lines per package, then the violations."""
    count: Counter[str] = Counter()
    for path in python_files("model1"):
        parts = path.relative_to(ROOT / "model1").parts
        count[parts[0] if len(parts) > 1 else "*.py"] += num_lines(path)
    print("lines:", ", ".join(f"{name} {n}" for name, n in sorted(count.items())))
    tests = sum(map(num_lines, python_files("tests")))
    print(f"total: model1 {sum(count.values())} of {LIBRARY_LINES}, tests {tests}")
    found = violations()
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
