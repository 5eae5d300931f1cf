"""What must hold before a time counts: the operators' GPU tests pass, and the tree has a name."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# pytest's plugins may be missing on a GPU image, and its settings are then errors
PYTEST = ("-q", "--slow", "-m", "gpu", "-o", "addopts=--import-mode=importlib", "-W", "default")
NO_TESTS = 5  # pytest's exit code; a share of few tests may be empty


def run_tests(patterns: Iterable[str], num_processes: int) -> None:
    """Exit unless the GPU tests of all these files pass, and there are some.

    Each process runs every num_processes-th test; they compile into one new cache.
    """
    files = sorted({str(path) for pattern in patterns for path in ROOT.glob(pattern)})
    command = [sys.executable, "-m", "pytest", *PYTEST, "-p", "benchmarks.shard", *files]
    with tempfile.TemporaryDirectory(prefix="model1-triton-") as cache:
        processes = [
            subprocess.Popen(
                [*command, f"--shard={i}/{num_processes}"],
                cwd=ROOT,
                env=os.environ | {"SHARED_TRITON_CACHE": cache},
            )
            for i in range(num_processes)
        ]
        codes = [process.wait() for process in processes]
    if set(codes) - {0, NO_TESTS}:
        sys.exit("tests fail: nothing was timed")
    if 0 not in codes:
        sys.exit("no test ran: nothing was timed")


def tree_name(given: str | None) -> str:
    """The commit of this tree, with -dirty if files differ from it, or the name given instead.

    Recorded results are no difference. Raises ValueError for a tree without a name and for two.
    """

    def git(*arguments: str) -> str:
        found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return found.stdout.strip() if found.returncode == 0 else ""

    has_history = git("rev-parse", "--show-toplevel") == str(ROOT)
    commit = git("rev-parse", "HEAD") if has_history else ""
    if commit and given:
        raise ValueError(f"--commit is for a tree without history, this one is at {commit}")
    if not commit and not given:
        raise ValueError("this tree has no history: say with --commit what it is a copy of")
    if given:
        return given
    changes = git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results")
    return f"{commit}-dirty" if changes else commit
