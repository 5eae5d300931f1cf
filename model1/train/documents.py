"""Reading text for training and evaluation, one document at a time.

A source is a folder of text files, a folder that holds `.jsonl.xz` shards, or one shard. A shard
line is a JSON object with "package", "path" and "text". In a folder of text the package of a file
is its first path component below the folder. Order is fixed: sources as given, paths sorted.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator, Sequence
from pathlib import Path

from model1.errors import DataError
from model1.train.corpus import Document

SHARD_SUFFIX = ".jsonl.xz"


def source_files(source: str | Path, suffixes: Sequence[str]) -> list[Path]:
    """Every file that `read_documents` reads from one source, sorted. Errors: `DataError`."""
    source = Path(source)
    if source.is_file():
        if not source.name.endswith(SHARD_SUFFIX):
            raise DataError(f"{source} is neither a folder nor a {SHARD_SUFFIX} shard")
        return [source]
    if not source.is_dir():
        raise DataError(f"data source {source} does not exist")
    shards = sorted(source.glob("*" + SHARD_SUFFIX))
    if shards:
        return shards
    files = [
        path
        for path in sorted(source.rglob("*"))
        if path.suffix in suffixes and path.is_file() and not _is_hidden(path, source)
    ]
    if not files:
        raise DataError(
            f"data folder {source} holds no {SHARD_SUFFIX} shard and no file ending in "
            f"{', '.join(suffixes)}"
        )
    return files


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def read_documents(
    sources: Sequence[str | Path], suffixes: Sequence[str] = (".py", ".txt", ".md", ".rst")
) -> Iterator[Document]:
    """Every document that has any text. Errors: `DataError` naming the file and the rule."""
    count = 0
    for source in sources:
        for path in source_files(source, suffixes):
            is_shard = path.name.endswith(SHARD_SUFFIX)
            for document in _read_shard(path) if is_shard else _read_text(path, Path(source)):
                if document.text:
                    count += 1
                    yield document
    if not count:
        raise DataError(f"data sources hold no text: {', '.join(map(str, sources))}")


def _read_text(path: Path, root: Path) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from error
    relative = path.relative_to(root)
    package = relative.parts[0] if len(relative.parts) > 1 else root.name
    yield Document(package, relative.as_posix(), text)


def _read_shard(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="\n") as lines:
            for line in lines:
                number += 1
                item = json.loads(line)
                yield Document(item["package"], item["path"], item["text"])
    except (lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is not a whole xz file: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text after line {number}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} line {number} must be a JSON object with "package", "path" and "text"'
        ) from error
