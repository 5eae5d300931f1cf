"""Directories that appear whole or not at all.

`atomic_directory` hands out a temporary directory beside the target. When the block ends well,
it writes MANIFEST.json, flushes everything to the disk and moves the result into place in one
step; when the block fails, or the process dies, the target is what it was before.

POSIX only. On Linux an existing target is exchanged atomically; where the kernel or the file
system cannot exchange, the old directory is renamed away first, so that for an instant there is
none, and the next write puts the old one back if the process died in that instant.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from model1.errors import CheckpointError
from model1.weights.manifest import MANIFEST_NAME, write_manifest

FILE_MODE = 0o644  # readable by a server that runs as another user
DIRECTORY_MODE = 0o755
_AT_FDCWD = -100  # linux/fcntl.h
_RENAME_EXCHANGE = 2  # linux/fs.h
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def atomic_directory(
    path: str | Path, *, provenance: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary directory that becomes `path` when the block ends without error.

    Files are made 0644, listed with size and SHA-256 in MANIFEST.json (with `provenance`, any
    JSON data), fsynced and renamed; an existing `path` stays readable until that moment.
    Temporary directories left by dead processes are removed. Raises CheckpointError if `path`
    exists and was not written by this function (it would be deleted), or if writing fails.
    """
    target = Path(path).resolve()  # a symbolic link keeps pointing at the new directory
    with write_errors(target):
        _remove_leftovers(target)
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.parent / f"{_prefix(target)}{_owner()}-{secrets.token_hex(4)}"
        temporary.mkdir()
    try:
        yield temporary
        with write_errors(target):
            write_manifest(temporary, provenance)
            _sync_tree(temporary)
            _check_replaceable(target)
            _move_into_place(temporary, target)
            sync(target.parent)
    finally:
        # After an exchange this name holds the old directory, after a plain rename nothing.
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, missing permission and the like into one CheckpointError for `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"cannot write {path}: {reason}") from error
    except SafetensorError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error


def sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for directory, _, files in os.walk(root, topdown=False):
        for name in files:
            file = Path(directory, name)
            file.chmod(FILE_MODE)
            sync(file)
        Path(directory).chmod(DIRECTORY_MODE)
        sync(Path(directory))


def _check_replaceable(target: Path) -> None:
    if target.parent.exists() and not target.parent.is_dir():
        raise CheckpointError(f"cannot write {target}: {target.parent} is not a directory")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"cannot write {target}: it exists and is not a directory")
    if any(target.iterdir()) and not (target / MANIFEST_NAME).is_file():
        raise CheckpointError(
            f"cannot write {target}: it holds other files and no {MANIFEST_NAME}, "
            "so replacing it could destroy somebody's data"
        )


def _move_into_place(temporary: Path, target: Path) -> None:
    try:
        os.rename(temporary, target)  # succeeds where there is nothing or an empty directory
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if not _exchange(temporary, target):
        aside = _aside(target)
        os.rename(target, aside)
        os.rename(temporary, target)
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two directory names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p]
    renameat2.argtypes += [ctypes.c_uint]
    names = _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b)
    if renameat2(*names, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(b))


def _prefix(target: Path) -> str:
    return f".{target.name}.tmp-"


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _owner() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"


def _remove_leftovers(target: Path) -> None:
    """Undo what a killed process left: its temporary directories and a half-done replacement."""
    if not target.parent.is_dir():
        return
    aside = _aside(target)
    if aside.is_dir():
        if target.exists():
            shutil.rmtree(aside)
        else:
            os.rename(aside, target)
    for entry in target.parent.iterdir():
        if entry.name.startswith(_prefix(target)) and _is_abandoned(entry.name, _prefix(target)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_abandoned(name: str, prefix: str) -> bool:
    """Whether the process of this machine that made the temporary directory is gone."""
    owner = name.removeprefix(prefix).rpartition("-")[0]
    host, _, process_id = owner.rpartition("-")
    if host != os.uname().nodename or not process_id.isdecimal():
        return False
    try:
        os.kill(int(process_id), 0)  # signal 0 only asks whether the process exists
    except ProcessLookupError:
        return True
    except PermissionError:  # it exists and belongs to somebody else
        return False
    return False
