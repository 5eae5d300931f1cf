"""The example backend as an installer would leave it: found through its entry point."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from line_budget import ROOT

from model1.ops import backend as dispatch

EXAMPLE = ROOT / "examples" / "example_backend"


@contextmanager
def installed_example(folder: Path) -> Iterator[None]:
    """Within it the wheel of the example lies unpacked in `folder`, where Python looks."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=EXAMPLE, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    sys.path.insert(0, str(folder))
    forget_plug_ins()
    yield
    sys.path.remove(str(folder))
    forget_plug_ins()


def forget_plug_ins() -> None:
    """Look for plug-ins anew."""
    importlib.invalidate_caches()
    dispatch.plug_ins.cache_clear()
    dispatch._resolve.cache_clear()
