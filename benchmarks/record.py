"""Where measured rows go: one JSON object per line in benchmarks/results, one file per device."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.gate import ROOT


def device_name() -> str:
    """The GPU's name, "cpu" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def results_path(device: str) -> Path:
    """The file of a device."""
    return ROOT / "benchmarks" / "results" / f"{re.sub('[^a-z0-9]+', '_', device.lower())}.jsonl"


def circumstances(module: str, commit: str) -> dict[str, Any]:
    """What a row must say beside its numbers; module: the program, as `python -m` names it."""
    return {
        "gpu": device_name(), "torch": torch.__version__, "commit": commit,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
    }  # fmt: skip


def append_rows(rows: Iterable[Mapping[str, Any]], about: Mapping[str, Any]) -> Path:
    """Append the rows, each with what it was measured on; the file."""
    path = results_path(about["gpu"])
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, **about}) + "\n" for row in rows)
    return path
