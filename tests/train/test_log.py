from __future__ import annotations

from pathlib import Path

import pytest

from model1.train.log import RunLog, read_log, truncate_log
from model1.train.plot import plot_losses


def write(path: Path, steps: range) -> None:
    with RunLog(path, quiet=True) as log:
        for step in steps:
            log.write(step=step, tokens=100 * step, cross_entropy=5.0 / (1 + step))


def test_a_resumed_log_drops_what_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    write(path, range(5))
    truncate_log(path, 2)
    write(path, range(3, 6))
    assert [r["step"] for r in read_log(path)] == [0, 1, 2, 3, 4, 5]
    truncate_log(tmp_path / "absent.jsonl", 2)
    assert not (tmp_path / "absent.jsonl").exists()


def test_progress_is_plain_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path / "log.jsonl") as log:
        log.progress(0.25, step=5, loss=1.5)
        log.say("done")
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(" 25.0 %  step 5  loss 1.5")
    assert second == "done"


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the plot needs matplotlib (extra: eval)")
    write(tmp_path / "log.jsonl", range(5))
    assert plot_losses({"run": tmp_path / "log.jsonl"}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "log.jsonl", range(5))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plot_losses({"run": tmp_path / "log.jsonl"}, tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
