"""The peer's wheel is unpacked to what can be imported alone."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks.peers.flash_mla import EXTENSION, INTERFACE, unpack


def make_wheel(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x = 1\n")
    return path


def test_the_extension_and_its_interface_alone_are_unpacked(tmp_path: Path) -> None:
    module = f"{INTERFACE}flash_mla_interface.py"
    wheel = make_wheel(
        tmp_path / "vllm-0.whl", EXTENSION, module, "vllm/engine.py", "vllm/__init__.py"
    )
    folder = tmp_path / "peers"
    unpack(wheel, folder)
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == {EXTENSION, module, "vllm/__init__.py", "vllm/third_party/__init__.py"}
    assert (folder / "vllm/__init__.py").read_text() == ""


def test_a_wheel_without_them_is_refused(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "vllm-1.whl", "vllm/engine.py")
    with pytest.raises(ValueError, match=r"vllm-1\.whl must hold"):
        unpack(wheel, tmp_path / "peers")
