from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from model1.errors import CheckpointError
from model1.weights import atomic
from model1.weights.atomic import atomic_directory
from model1.weights.manifest import MANIFEST_NAME, verify_manifest


def write(path: Path, text: str) -> None:
    with atomic_directory(path, provenance={"text": text}) as temporary:
        (temporary / "a.json").write_text(text, encoding="utf-8")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "b.bin").write_bytes(b"b")


def fail_half_way(path: Path) -> None:
    with atomic_directory(path) as temporary:
        (temporary / "a.json").write_text("half", encoding="utf-8")
        raise KeyError("stop")


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of replacing an existing directory."""
    if request.param == "two renames":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)


@pytest.mark.usefixtures("either_way")
def test_writes_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "checkpoint"
    for text in ("1", "2"):
        write(target, text)
        assert (target / "a.json").read_text(encoding="utf-8") == text
        assert verify_manifest(target).provenance == {"text": text}
        assert os.listdir(target.parent) == ["checkpoint"]


def test_modes(tmp_path: Path) -> None:
    old_mask = os.umask(0o077)
    try:
        write(tmp_path / "c", "1")
    finally:
        os.umask(old_mask)
    for path in [tmp_path / "c", *(tmp_path / "c").rglob("*")]:
        expected = 0o755 if path.is_dir() else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == expected


@pytest.mark.parametrize("existing", [False, True])
def test_failure_leaves_what_was_there(tmp_path: Path, existing: bool) -> None:
    target = tmp_path / "c"
    if existing:
        write(target, "old")
    with pytest.raises(KeyError):
        fail_half_way(target)
    assert os.listdir(tmp_path) == (["c"] if existing else [])
    if existing:
        verify_manifest(target)


def test_target_is_readable_until_replaced(tmp_path: Path) -> None:
    target = tmp_path / "c"
    write(target, "old")
    with atomic_directory(target) as temporary:
        (temporary / "a.json").write_text("new", encoding="utf-8")
        assert (target / "a.json").read_text(encoding="utf-8") == "old"
        verify_manifest(target)


def test_somebody_elses_directory_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"home: it holds other files and no MANIFEST\.json"):
        write(tmp_path / "home", "1")
    assert os.listdir(tmp_path / "home") == ["thesis.tex"]
    assert os.listdir(tmp_path) == ["home"]


def test_empty_directory_is_replaced_and_file_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "1")
    verify_manifest(tmp_path / "empty")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists and is not a directory"):
        write(tmp_path / "file", "1")


def test_symbolic_link_keeps_pointing(tmp_path: Path) -> None:
    write(tmp_path / "real", "1")
    (tmp_path / "latest").symlink_to("real")
    write(tmp_path / "latest", "2")
    assert (tmp_path / "latest").is_symlink()
    assert (tmp_path / "real" / "a.json").read_text(encoding="utf-8") == "2"


def test_leftovers_of_dead_processes_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    host = os.uname().nodename
    dead = tmp_path / f".c.tmp-{host}-{process.pid}-00000000"
    alive = tmp_path / f".c.tmp-{host}-{os.getpid()}-00000000"
    elsewhere = tmp_path / f".c.tmp-not-{host}-1-00000000"
    other = tmp_path / f".d.tmp-{host}-{process.pid}-00000000"
    for path in (dead, alive, elsewhere, other):
        path.mkdir()
    write(tmp_path / "c", "1")
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()
    assert other.exists()


def test_death_between_two_renames_is_repaired(tmp_path: Path) -> None:
    write(tmp_path / "c", "old")
    os.rename(tmp_path / "c", tmp_path / ".c.old")
    with pytest.raises(KeyError):
        fail_half_way(tmp_path / "c")
    assert (tmp_path / "c" / "a.json").read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["c"]


def test_unwritable_place_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/c: .*file is not a directory"):
        write(tmp_path / "file" / "c", "1")


def test_manifest_lists_sub_directories(tmp_path: Path) -> None:
    write(tmp_path / "c", "1")
    assert set(verify_manifest(tmp_path / "c").files) == {"a.json", "sub/b.bin"}
    assert (tmp_path / "c" / MANIFEST_NAME).is_file()
