from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from model1.train.log import read_log

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_tiny.py"


def test_the_example_trains_on_a_folder(
    text_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [str(EXAMPLE), str(text_dir), str(tmp_path), "5"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    losses = [r["loss"] for r in read_log(tmp_path / "run" / "log.jsonl") if "loss" in r]
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "final" / "MANIFEST.json").is_file()
