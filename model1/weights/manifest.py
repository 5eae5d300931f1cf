"""MANIFEST.json: size and SHA-256 of every file of a directory, and where the data came from.

It guards against accidents (truncation, bit rot, mixed-up copies) and against tampering by
whoever cannot also rewrite the manifest; it is not a signature.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from model1.errors import CheckpointError

MANIFEST_NAME = "MANIFEST.json"
MANIFEST_VERSION = 1
# Files of these kinds are read by the loaders, so one that the manifest does not list is refused;
# a README or a plot put beside them is nobody's business.
READ_SUFFIXES = (".safetensors", ".json", ".jinja")


class Manifest(NamedTuple):
    """What MANIFEST.json says."""

    files: dict[str, tuple[int, str]]  # name -> (bytes, SHA-256 in hex)
    provenance: dict[str, Any]


def write_manifest(directory: Path, provenance: Mapping[str, Any] | None = None) -> None:
    """Write MANIFEST.json for all files below `directory`; `provenance` is JSON data."""
    files = {
        file.relative_to(directory).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": _sha256(file),
        }
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / MANIFEST_NAME
    }
    data = {"version": MANIFEST_VERSION, "files": files, "provenance": dict(provenance or {})}
    try:
        text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"provenance must be JSON data: {error}") from error
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")


def verify_manifest(directory: str | Path) -> Manifest:
    """Check every file of `directory` against its MANIFEST.json and return what that says.

    Raises CheckpointError naming the file when the directory or the manifest is missing or
    unreadable, when a listed file is missing, truncated or altered, and when a .safetensors,
    .json or .jinja file is not listed.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint at {directory}: there is no such directory")
    manifest = _read_manifest(directory / MANIFEST_NAME)
    for name, (num_bytes, digest) in manifest.files.items():
        _check_file(directory / name, num_bytes, digest)
    for file in sorted(directory.rglob("*")):
        name = file.relative_to(directory).as_posix()
        unlisted = name not in manifest.files and name != MANIFEST_NAME
        if unlisted and file.suffix in READ_SUFFIXES and file.is_file():
            raise CheckpointError(f"{file} does not belong here: {MANIFEST_NAME} does not list it")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """Read a UTF-8 file that holds one JSON object; CheckpointError names the file otherwise."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON in UTF-8: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(data).__name__}")
    return data


def _read_manifest(path: Path) -> Manifest:
    data = read_json(path)
    if data.get("version") != MANIFEST_VERSION:
        raise CheckpointError(
            f"{path} has version {data.get('version')!r}, only {MANIFEST_VERSION} is known"
        )
    listed, provenance = data.get("files"), data.get("provenance")
    if not isinstance(listed, dict) or not isinstance(provenance, dict):
        raise CheckpointError(f"{path} must hold the objects 'files' and 'provenance'")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in listed.items():
        inside = PurePosixPath(name)
        if inside.is_absolute() or ".." in inside.parts:
            raise CheckpointError(f"{path} lists {name!r}, which is outside its directory")
        num_bytes = entry.get("bytes") if isinstance(entry, dict) else None
        digest = entry.get("sha256") if isinstance(entry, dict) else None
        if not isinstance(num_bytes, int) or not isinstance(digest, str):
            raise CheckpointError(f"{path} must give 'bytes' and 'sha256' of {name!r}")
        files[name] = num_bytes, digest
    return Manifest(files, provenance)


def _check_file(file: Path, num_bytes: int, digest: str) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing")
    actual = file.stat().st_size
    if actual != num_bytes:
        raise CheckpointError(
            f"{file} is truncated or altered: {actual} bytes, {MANIFEST_NAME} says {num_bytes}"
        )
    if _sha256(file) != digest:
        raise CheckpointError(f"{file} is altered: its SHA-256 is not the one in {MANIFEST_NAME}")


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
