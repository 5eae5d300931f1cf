"""Which Triton kernels ship, launched how, and a name for each module's code and launches."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import tokenize
from collections.abc import Sequence
from pathlib import Path

import model1
from model1.ops.compile_cases import CompileCase
from model1.ops.launch import USUAL_CHANNELS
from model1.testing.targets import TARGETS

MODULES = (
    "model1.ops.activation.portable",
    "model1.ops.cross_entropy.portable",
    "model1.ops.engram.portable",
    "model1.ops.engram.portable_conv",
    "model1.ops.engram.portable_rows",
    "model1.ops.engram.portable_train",
    "model1.ops.fp8_linear.portable",
    "model1.ops.grouped_matmul.portable",
    "model1.ops.kv_cache.portable",
    "model1.ops.kv_write.portable",
    "model1.ops.lowrank_attention.portable",
    "model1.ops.lowrank_remainder.portable",
    "model1.ops.mha_prefill.portable",
    "model1.ops.mhc.portable",
    "model1.ops.mhc.portable_backward",
    "model1.ops.mhc.portable_chain",
    "model1.ops.mhc.portable_chain_backward",
    "model1.ops.mhc.portable_head",
    "model1.ops.mhc.portable_phi",
    "model1.ops.mhc.portable_seam_backward",
    "model1.ops.mhc.portable_single_pass",
    "model1.ops.mhc.portable_streams",
    "model1.ops.moe.portable_route",
    "model1.ops.moe.portable_rows",
    "model1.ops.moe.portable_sort",
    "model1.ops.norm.portable",
    "model1.ops.norm.portable_backward",
    "model1.ops.paged_decode.hopper",
    "model1.ops.paged_decode.portable",
    "model1.ops.rope.portable",
    "model1.ops.rope_gate.portable",
    "model1.ops.selector.portable",
    "model1.ops.selector.portable_lightning",
    "model1.ops.sparse_decode.hopper",
    "model1.ops.sparse_decode.portable",
    "model1.ops.sparse_prefill.hopper",
    "model1.ops.sparse_prefill.hopper_backward",
    "model1.ops.sparse_prefill.portable",
    "model1.ops.sparse_prefill.portable_backward",
)


def shipped_cases(module: str, target: str) -> list[CompileCase]:
    """The launches that a kernel module declares for a target."""
    return importlib.import_module(module).shipped_kernels(TARGETS[target].gpu)


def largest(cases: Sequence[CompileCase]) -> list[int]:
    """Of each kernel the launch with the largest sizes: what needs most registers and memory.

    Rows wider than any model's are left out: they take longer than all others together.
    """
    best: dict[str, tuple[int, int]] = {}
    for idx, case in enumerate(cases):
        if case.constexprs.get("VALUE_DIM", 0) > USUAL_CHANNELS:
            continue
        sizes = (x for n, x in case.constexprs.items() if not n.lower().startswith("stride"))
        size = sum(x for x in sizes if type(x) is int)
        name = case.kernel.fn.__name__
        best[name] = max(best.get(name, (-1, 0)), (size, idx))
    return sorted(idx for _, idx in best.values())


def identity(case: CompileCase) -> str:
    """Everything about a case but its name."""
    sizes = sorted((name, str(value)) for name, value in case.constexprs.items())
    kernel, types = case.kernel.fn.__name__, sorted(case.signature.items())
    return repr((kernel, types, sizes, case.num_warps, case.num_stages, case.max_registers))


def digest(module: str) -> str:
    """A name for all that decides what a module's kernels take: code without comments, launches.

    The code is its own and that of all it imports from here, as far as it imports Triton.
    """
    total = hashlib.sha256()
    for path in sorted(kernel_files(module)):
        total.update(_code(path).encode())
    for target in TARGETS:
        for case in shipped_cases(module, target):
            total.update(f"{target}{case.name}{identity(case)}".encode())
    return total.hexdigest()[:16]


def kernel_files(module: str) -> set[Path]:
    """The files that import Triton, among the module and what it imports from model1."""
    found, files, left = {module}, set(), [module]
    while left:
        path = _path(left.pop())
        imported = _imports(path)
        if any(name.split(".")[0] == "triton" for name in imported):
            files.add(path)
        new = {name for name in imported if name.startswith("model1.") and _path(name).is_file()}
        left += new - found
        found |= new
    return files


@functools.cache
def _imports(path: Path) -> frozenset[str]:
    """Names of modules in the import statements of a file, and of what it takes from them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def _path(module: str) -> Path:
    base = Path(model1.__file__).parent.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")


def _code(path: Path) -> str:
    """A file without comments, blanks and line breaks; > and < where it is indented and back."""
    with path.open("rb") as file:
        marks = {tokenize.COMMENT: "", tokenize.INDENT: ">", tokenize.DEDENT: "<"}
        code = "".join(marks.get(t.type, t.string) for t in tokenize.tokenize(file.readline))
    return "".join(code.split())
