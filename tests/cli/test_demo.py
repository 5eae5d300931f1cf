"""The demo's own logic; `make demo` as a whole is run by the test of the README."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model1.cli import demo
from model1.tokenizer import Tokenizer
from model1.weights import default_checkpoint


def chunk(text: str | None, tokens: int | None = None) -> Any:
    choices = [] if text is None else [SimpleNamespace(text=text)]
    usage = SimpleNamespace(prompt_tokens=3, completion_tokens=tokens) if tokens else None
    return SimpleNamespace(choices=choices, usage=usage)


def test_a_stream_becomes_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    chunks = [chunk(""), chunk("re"), chunk("turn 1"), chunk(None, tokens=3)]
    answer = demo.read_stream("x", lambda: iter(chunks), show=True)
    assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("return 1", 3, 3)
    assert answer.tokens_per_second > 0
    assert capsys.readouterr().out == "return 1\n"


@pytest.mark.parametrize("chunks", [[], [chunk(" \n", tokens=2)], [chunk("x")]])
def test_an_answer_without_text_or_usage_is_a_failure(chunks: list[Any]) -> None:
    with pytest.raises(demo.DemoError, match="no text came back for: x"):
        demo.read_stream("x", lambda: iter(chunks), show=False)


def test_eight_requests_become_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    def complete(prompt: str) -> Iterator[Any]:
        return iter([chunk(prompt[:4]), chunk(None, tokens=5)])

    answer = demo.ask_together(complete)
    assert answer.completion_tokens == 40
    assert len(capsys.readouterr().out.splitlines()) == 8
    demo.print_table([answer], 584)
    table = capsys.readouterr().out
    for header in ("first token s", "total s", "tok/s", "first words of the answer"):
        assert header in table
    assert "584" in table


def test_the_long_prompt_is_the_fewest_whole_lines_that_reach_the_tokens() -> None:
    tokenizer = Tokenizer.from_dir(default_checkpoint())
    prompt = demo.long_prompt(tokenizer)
    assert demo.LONG_FILE.read_text(encoding="utf-8")[len(prompt)] == "\n"
    assert len(tokenizer.encode(prompt)) >= demo.LONG_PROMPT_TOKENS
    assert "class Semaphore" in prompt  # what the question is about
    assert "Semaphore.acquire" in demo.LONG_QUESTION
    without_last_line = prompt.rpartition("\n")[0]
    assert len(tokenizer.encode(without_last_line)) < demo.LONG_PROMPT_TOKENS


def test_no_prompt_ends_in_a_line_break() -> None:
    assert len(demo.TOGETHER) == 8
    assert not any(prompt[-1].isspace() for prompt in (demo.CODE, *demo.TOGETHER))


@pytest.mark.slow
def test_a_failure_exits_1_with_the_servers_log(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Its weights are random and its context is too short for the long file.
    assert demo.main([str(checkpoint)]) == 1
    shown = capsys.readouterr()
    assert "server ready at http://127.0.0.1:" in shown.out
    assert "end of the server's log:" in shown.err
    assert shown.err.startswith("error: ")
    assert "ready on http" in shown.err
    assert "Traceback" not in shown.err


@pytest.mark.slow
def test_a_server_that_does_not_start_exits_1_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo.main([str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert "the server did not start" in error
    assert "nothing" in error.splitlines()[-1]
