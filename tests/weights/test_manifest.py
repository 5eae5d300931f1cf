from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model1.errors import CheckpointError
from model1.weights.manifest import MANIFEST_NAME, read_json, verify_manifest, write_manifest


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(200)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("hello", encoding="utf-8")
    write_manifest(tmp_path, {"sources": ["a"], "licences": {"a": "MIT"}})
    return tmp_path


def edit(directory: Path, change: Any) -> None:
    path = directory / MANIFEST_NAME
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def test_intact(directory: Path) -> None:
    manifest = verify_manifest(directory)
    assert manifest.provenance == {"sources": ["a"], "licences": {"a": "MIT"}}
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        "weights.safetensors": 200,
        "sub/notes.txt": 5,
    }


@pytest.mark.parametrize("position", [0, 100, 199])
def test_every_flipped_byte_is_seen(directory: Path, position: int) -> None:
    data = bytearray((directory / "weights.safetensors").read_bytes())
    data[position] ^= 1
    (directory / "weights.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is altered: its SHA-256"):
        verify_manifest(directory)


def test_truncated(directory: Path) -> None:
    (directory / "weights.safetensors").write_bytes(b"short")
    message = r"weights\.safetensors is truncated or altered: 5 bytes, MANIFEST\.json says 200"
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(directory)


def test_missing_file_manifest_and_directory(directory: Path) -> None:
    (directory / "sub" / "notes.txt").unlink()
    with pytest.raises(CheckpointError, match=r"notes\.txt is missing"):
        verify_manifest(directory)
    (directory / MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json is missing"):
        verify_manifest(directory)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*: there is no such directory"):
        verify_manifest(directory / "nowhere")


def test_unlisted_files_that_a_loader_would_read_are_refused(directory: Path) -> None:
    (directory / "README.md").write_text("fine", encoding="utf-8")
    verify_manifest(directory)
    (directory / "more.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"more\.safetensors does not belong here"):
        verify_manifest(directory)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/../../x"])
def test_paths_outside_are_refused(directory: Path, name: str) -> None:
    entry = {"bytes": 1, "sha256": "0"}
    edit(directory, lambda data: data["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match="outside its directory"):
        verify_manifest(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=2), "version 2, only 1 is known"),
        (lambda d: d.pop("files"), "must hold the objects 'files' and 'provenance'"),
        (lambda d: d["files"].update(x=[]), "must give 'bytes' and 'sha256' of 'x'"),
        (lambda d: d["files"].update(x={"bytes": "1", "sha256": "0"}), "must give 'bytes'"),
    ],
)
def test_malformed_manifest(directory: Path, change: Any, message: str) -> None:
    edit(directory, change)
    with pytest.raises(CheckpointError, match=message):
        verify_manifest(directory)


@pytest.mark.parametrize("provenance", [{"a": object()}, {"a": float("nan")}])
def test_provenance_must_be_json(tmp_path: Path, provenance: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="provenance must be JSON data"):
        write_manifest(tmp_path, provenance)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe{}", "not valid JSON in UTF-8"),
        (b"{", "not valid JSON in UTF-8"),
        (b"[" * 100_000, "not valid JSON in UTF-8"),
        (b"[]", "must hold a JSON object, got list"),
    ],
)
def test_read_json_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.json.*{message}"):
        read_json(tmp_path / "x.json")
