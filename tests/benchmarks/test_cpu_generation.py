"""The CPU benchmark: real calls are timed, rates agree with the clock, recorded rows are whole."""

from __future__ import annotations

import importlib.metadata
import json
import time
from pathlib import Path

import pytest

from benchmarks import cpu_generation
from benchmarks.cpu_generation import PEER, Case, Row, main, run_contender, time_case

NEW_TOKENS = 8


def test_rates_agree_with_the_clock() -> None:
    start = time.perf_counter()
    rows = run_contender("model1-int8", threads=1, new_tokens=NEW_TOKENS, repeats=1)
    elapsed_s = time.perf_counter() - start
    assert [row.case.batch for row in rows] == [1, 8, 1]
    assert [row.case.new_tokens for row in rows] == [NEW_TOKENS, NEW_TOKENS, 1]
    assert 0 < sum(row.seconds["median"] for row in rows) < elapsed_s
    for row in rows[:2]:
        assert row.tokens_per_s is not None
        num_tokens = row.tokens_per_s["median"] * row.seconds["median"]
        assert num_tokens == pytest.approx(row.case.batch * NEW_TOKENS)
    assert rows[2].tokens_per_s is None


def test_the_first_call_does_not_count_and_no_prompt_comes_twice() -> None:
    calls: list[tuple[list[list[int]], int]] = []

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        calls.append((prompts, new_tokens))
        time.sleep(0.05 if len(calls) == 1 else 0.0)
        return len(prompts) * new_tokens

    seconds = time_case(generate, Case("sample", 2, 5, 40), repeats=3)
    assert len(seconds) == 3
    assert max(seconds) < 0.05
    assert [new_tokens for _, new_tokens in calls] == [cpu_generation.WARM_UP_TOKENS, 40, 40, 40]
    prompts = [tuple(prompt) for batch, _ in calls for prompt in batch]
    assert {len(prompt) for prompt in prompts} == {5}
    assert len(set(prompts)) == len(prompts) == 8


def test_a_contender_that_stops_early_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="asked for 8 tokens, got 7"):
        time_case(lambda prompts, new_tokens: 7, Case("sample", 1, 5, 8), repeats=1)


def fake_rows(name: str, threads: int, new_tokens: int, repeats: int) -> list[Row]:
    """Each contender twice as fast with two threads, the peer four times slower."""
    seconds = (4.0 if name == PEER else 1.0) / threads
    spread = {"median": seconds, "min": seconds, "max": seconds}
    cases = cpu_generation.cases(new_tokens)
    return [Row(name, threads, case, repeats, spread, None, 0.5) for case in cases]


def test_recorded_rows_are_whole_and_appended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_generation, "in_own_process", fake_rows)
    monkeypatch.setattr(cpu_generation, "RESULTS", tmp_path / "results" / "cpu.jsonl")
    arguments = ["--contenders", "model1-int8", "--threads", "1", "--no-server", "--record"]
    assert main(arguments) == 0
    assert main(arguments) == 0
    rows = [json.loads(line) for line in cpu_generation.RESULTS.read_text().splitlines()]
    assert len(rows) == 6
    for row in rows:
        assert set(row) == {
            "name", "threads", "case", "batch", "prompt_tokens", "new_tokens", "repeats", "seconds",
            "tokens_per_s", "load_average", "cpu", "cores", "niceness", "torch", "transformers",
            "commit", "has_changes", "command", "date",
        }  # fmt: skip
        assert set(row["seconds"]) == {"median", "min", "max"}
        assert len(row["commit"]) == 40
        assert row["command"].endswith(" ".join(arguments))
        assert row["torch"] == importlib.metadata.version("torch")
    assert "x peer" not in capsys.readouterr().out


@pytest.mark.parametrize("has_peer", [True, False])
def test_the_peer_is_compared_or_named_as_missing(
    has_peer: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"transformers": "5.0" if has_peer else None}
    monkeypatch.setattr(cpu_generation, "circumstances", lambda arguments: facts)
    monkeypatch.setattr(cpu_generation, "in_own_process", fake_rows)
    assert main(["--no-server"]) == 0
    output = capsys.readouterr().out
    assert output.count("4.00 x peer") == (3 if has_peer else 0)
    assert ("install the [hf] extra" in output) is not has_peer
    assert ("\n" + PEER in output) is has_peer


@pytest.mark.parametrize("flag", ["--repeats", "--threads", "--new-tokens"])
def test_nothing_to_measure_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([flag, "0"])
    assert "at least" in capsys.readouterr().err
