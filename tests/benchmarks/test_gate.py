"""Nothing is timed unless tests ran and passed; what is recorded says what it was measured on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from line_budget import ROOT

from benchmarks import gate, run

PATTERNS = ("tests/test_a.py", "tests/test_*.py")
TESTS = """
import os, pytest

pytestmark = [pytest.mark.gpu, pytest.mark.skipif({skipped}, reason="no GPU")]


@pytest.mark.parametrize("number", range(3))
def test_{name}(number):
    with open("ran", "a") as file:
        print("{name}", number, os.getpid(), os.environ["SHARED_TRITON_CACHE"], file=file)
    assert number not in {bad}
"""
CONFTEST = """
def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true")

def pytest_configure(config):
    assert config.getoption("--slow")
    config.addinivalue_line("markers", "gpu: here")
"""


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two test files, of three GPU tests each that pass."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "tests" / "conftest.py").write_text(CONFTEST)
    for name in "ab":
        write_tests(tmp_path, name)
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take seconds to import
    return tmp_path


def write_tests(tree: Path, name: str, *, bad: tuple[int, ...] = (), skipped: bool = False) -> None:
    text = TESTS.format(name=name, bad=bad, skipped=skipped)
    (tree / "tests" / f"test_{name}.py").write_text(text)


def test_processes_share_the_tests_and_a_cache(tree: Path) -> None:
    gate.run_tests(PATTERNS, 2)
    ran = [line.split() for line in (tree / "ran").read_text().splitlines()]
    assert sorted((name, number) for name, number, *_ in ran) == [
        (name, number) for name in "ab" for number in "012"
    ]
    processes = [process for _, _, process, _ in ran]
    assert sorted(map(processes.count, set(processes))) == [3, 3]
    (cache,) = {cache for *_, cache in ran}
    assert not Path(cache).exists()


def test_one_failure_in_one_process_is_enough(tree: Path) -> None:
    write_tests(tree, "b", bad=(1,))
    with pytest.raises(SystemExit, match="tests fail: nothing was timed"):
        gate.run_tests(PATTERNS, 2)


def test_a_process_without_tests_fails_nothing(tree: Path) -> None:
    gate.run_tests(["tests/test_a.py"], 4)
    assert len((tree / "ran").read_text().splitlines()) == 3


def test_skipped_tests_are_not_enough(tree: Path) -> None:
    for name in "ab":
        write_tests(tree, name, skipped=True)
    with pytest.raises(SystemExit, match="no test ran: nothing was timed"):
        gate.run_tests(PATTERNS, 2)


def git(tree: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@x", *arguments]
    done = subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_tree_is_named_by_its_commit_or_by_hand(tree: Path) -> None:
    with pytest.raises(ValueError, match="has no history: say with --commit"):
        gate.tree_name(None)
    assert gate.tree_name("copy-of-1234") == "copy-of-1234"
    git(tree, "init", "--quiet")
    (tree / ".gitignore").write_text("ignored\n")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "--message", "x")
    commit = git(tree, "rev-parse", "HEAD")
    assert gate.tree_name(None) == commit
    with pytest.raises(ValueError, match=f"this one is at {commit}"):
        gate.tree_name("copy-of-1234")
    results = tree / "benchmarks" / "results"
    results.mkdir(parents=True)
    for path in (tree / "ignored", results / "gpu.jsonl"):
        path.touch()
    assert gate.tree_name(None) == commit
    (tree / "new.py").touch()
    assert gate.tree_name(None) == f"{commit}-dirty"
    (tree / "new.py").unlink()
    (tree / "pytest.ini").write_text("[pytest]\naddopts =\n")
    assert gate.tree_name(None) == f"{commit}-dirty"


def test_the_tests_of_all_chosen_operators_run_once_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def refuse(patterns: list[str], num_processes: int) -> None:
        asked.append((patterns, num_processes))
        sys.exit("refused")

    chosen = [f"--operator={name}" for name in ("sparse_decode", "dense_decode")]
    monkeypatch.setattr(sys, "argv", ["run", *chosen, "--test-processes=3"])
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "run_tests", refuse)
    with pytest.raises(SystemExit, match="refused"):
        run.main()
    ((patterns, num_processes),) = asked
    assert num_processes == 3
    assert {*patterns} == {
        "tests/ops/test_sparse_decode*.py",
        "tests/ops/test_paged_decode*.py",
        "tests/test_flash_mla_gpu.py",
    }
