"""What a run reports: one JSON line a time in a file, and a progress line for people."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

BAR_WIDTH = 24


def format_seconds(seconds: float) -> str:
    """h:mm:ss."""
    minutes, seconds_left = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds_left:02d}"


class RunLog:
    """Appends records to `path` and shows progress on stderr: a bar on a terminal, else lines."""

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._quiet, self._is_terminal = quiet, sys.stderr.isatty()
        self._bar_open = False
        self.started = time.time()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_bar()

    def write(self, **record: Any) -> None:
        """Append one record as a JSON line."""
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def say(self, text: str) -> None:
        """Print one line for people."""
        if not self._quiet:
            self._end_bar()
            print(text, file=sys.stderr, flush=True)

    def progress(self, share: float, **values: float) -> None:
        """Show how far the run is, with some numbers beside it."""
        if self._quiet:
            return
        numbers = "  ".join(f"{key} {value:,.4g}" for key, value in values.items())
        line = f"{100 * share:5.1f} %  {numbers}  {format_seconds(time.time() - self.started)}"
        if self._is_terminal:
            filled = "#" * int(share * BAR_WIDTH)
            print(f"\r[{filled:<{BAR_WIDTH}}] {line}\x1b[K", end="", file=sys.stderr, flush=True)
            self._bar_open = True
        else:
            print(line, file=sys.stderr, flush=True)

    def _end_bar(self) -> None:
        if self._bar_open:
            print(file=sys.stderr, flush=True)
            self._bar_open = False


def read_log(path: Path) -> list[dict[str, Any]]:
    """All records of a log file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def truncate_log(path: Path, last_step: int) -> None:
    """Drop records after `last_step`: a run that resumes there writes them again."""
    if path.exists():
        kept = [r for r in read_log(path) if r.get("step", 0) <= last_step]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
