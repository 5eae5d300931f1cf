"""README.md tells the truth: its commands and snippets run, its tree is the tree on the disk."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from line_budget import ROOT, python_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL1 = [sys.executable, "-m", "model1.cli"]
SERVED_AT = "http://127.0.0.1:8000"

# Each command of the README and the test that runs it; one without a test fails below.
COMMANDS = {
    "make demo": "test_make_demo",
    "make test": "test_make_test_runs_the_checks_and_every_test",
    "make serve": "server",
    "curl": "test_curl_command",
    "model1 generate": "test_command_line",
    "model1 chat": "test_chat_command",
    "model1 info": "test_command_line",
    "model1 eval": "test_command_line",
    "model1 train": "test_train_command",
}

# Server, demo and training in one worker, one after the other: together they only slow each other.
one_worker = pytest.mark.xdist_group("readme")


def blocks(language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """Shell commands of the README: continued lines joined, comments and blank lines gone."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+#.*$", "", line).strip() for line in lines if line.strip()]


def command(start: str) -> str:
    (found,) = (c for c in commands() if c.startswith(start))
    return found


def snippet(containing: str) -> str:
    (found,) = (b for b in blocks("python") if containing in b)
    return found


def run(
    arguments: list[str], *, timeout_s: float, stdin: str = "", cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run to the end and insist on success."""
    result = subprocess.run(
        arguments, input=stdin, capture_output=True, text=True, timeout=timeout_s, cwd=cwd
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def make(target: str, *arguments: str) -> list[str]:
    """A make call in this environment, whichever it is."""
    if Path(sys.executable) == ROOT / ".venv" / "bin" / "python":
        return ["make", target, *arguments]
    return ["make", target, f"PY={sys.executable}", *arguments]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`make serve` on a free port: the printed URL, without /v1."""
    log = tmp_path_factory.mktemp("serve") / "output.txt"
    with log.open("w") as output:
        process = subprocess.Popen(
            make("serve", "ARGS=--port 0"),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield wait_for_url(log, process)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
    assert "curl http://127.0.0.1:" in log.read_text()


def wait_for_url(log: Path, process: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if "curl " in log.read_text():
            found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text())
            assert found is not None
            return found[0]
        time.sleep(0.2)
    raise AssertionError(f"make serve did not become ready:\n{log.read_text()}")


def test_every_command_has_a_test() -> None:
    assert len(commands()) >= 9
    for text in commands():
        assert [start for start in COMMANDS if text.startswith(start)], text
    for start, test in COMMANDS.items():
        assert test in globals(), test
        assert any(text.startswith(start) for text in commands()), start


def test_every_fence_is_known() -> None:
    fences = re.findall(r"^```(\w*)$", README, re.MULTILINE)
    assert set(fences[0::2]) == {"sh", "python", "text"}
    assert set(fences[1::2]) == {""}
    assert len(blocks("python")) == 2  # each is run below


def test_tree_equals_the_disk() -> None:
    listed = re.findall(r"^([\w./]+)/\s{2,}\S", blocks("text")[0], re.MULTILINE)
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    ignored |= {"__pycache__"}

    def folders(parent: Path) -> set[str]:
        return {
            str(p.relative_to(ROOT))
            for p in parent.iterdir()
            if p.is_dir() and p.name[0] != "." and p.name not in ignored and any(p.iterdir())
        }

    assert set(listed) == folders(ROOT) | folders(ROOT / "model1")
    assert listed == sorted(listed)


def test_links_and_named_files_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    named = re.findall(r"`((?:model1|configs|docs|checkpoints)/[\w./]*)`", README)
    for target in [*(t for t in targets if not t.startswith("http")), *named]:
        assert (ROOT / target).exists(), target


def test_every_environment_variable_is_documented() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in python_files("model1"))
    read = set(re.findall(r"[\"'](MODEL1_[A-Z_]+)[\"']", source))
    assert read == set(re.findall(r"`(MODEL1_[A-Z_]+)`", README))


def test_make_test_runs_the_checks_and_every_test() -> None:
    plan = run(make("test", "--dry-run"), timeout_s=60).stdout
    for part in ("ruff format --check", "ruff check", "pyright", "lint-imports", "line_budget"):
        assert part in plan
    assert "pytest -n 2" in plan
    assert "--slow" in plan
    assert "exec make test" in (ROOT / ".ci" / "run").read_text()


def test_activation_is_what_make_sets_up() -> None:
    assert "`. .venv/bin/activate`" in README
    assert "VENV ?= .venv\n" in (ROOT / "Makefile").read_text()


@pytest.mark.slow
@one_worker
def test_make_demo() -> None:
    output = run(make("demo"), timeout_s=240).stdout
    assert "tok/s" in output
    assert "everything answered" in output


@pytest.mark.slow
@one_worker
def test_offline_snippet() -> None:
    result = run([sys.executable, "-c", snippet("from model1 import LLM")], timeout_s=120)
    assert result.stdout.count(" length\n") + result.stdout.count(" stop\n") == 2


@pytest.mark.slow
@one_worker
def test_client_snippet(server: str) -> None:
    code = snippet("from openai import OpenAI")
    assert SERVED_AT in code
    result = run([sys.executable, "-c", code.replace(SERVED_AT, server)], timeout_s=120)
    assert result.stdout.strip()


@pytest.mark.slow
@one_worker
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_command(server: str) -> None:
    text = command("curl")
    assert SERVED_AT in text
    result = run(["sh", "-c", text.replace(SERVED_AT, server)], timeout_s=120)
    assert '"choices"' in result.stdout


@pytest.mark.slow
@one_worker
@pytest.mark.parametrize("verb", ["generate", "info", "eval"])
def test_command_line(verb: str) -> None:
    arguments = shlex.split(command(f"model1 {verb}"))[1:]
    assert run([*MODEL1, *arguments], timeout_s=240).stdout.strip()


@pytest.mark.slow
@one_worker
def test_chat_command() -> None:
    result = run([*MODEL1, "chat"], timeout_s=120, stdin="What does json.dumps do?\n")
    assert result.stdout.strip()


@pytest.mark.slow
@one_worker
def test_train_command(tmp_path: Path) -> None:
    arguments = shlex.split(command("model1 train"))[1:]
    arguments += ["--set", f"out_dir={tmp_path / 'run'}", "--set", f"data.cache_dir={tmp_path}"]
    run([*MODEL1, *arguments], timeout_s=280)
    result = tmp_path / "run" / "final"  # a checkpoint like the shipped one, says the README
    options = ["--max-tokens", "4", "--temperature", "0"]
    run([*MODEL1, "generate", "def f(x):", "--model", str(result), *options], timeout_s=60)
    checked = [str(result), "--data", "tests/cli", "--seq-len", "64", "--max-bytes", "2000"]
    run([*MODEL1, "eval", *checked, "--dense"], timeout_s=60)
