"""Turns folders and installed packages into a clean text corpus with a record of its sources.

Selection is deterministic: files in path order, packages in the order given, held-out packages
first, so that a training file which repeats held-out text is the one that goes. Nothing is
downloaded and no file is rewritten; a file is taken whole or left out for a counted reason.
"""

from __future__ import annotations

import json
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha1
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

from model1.errors import DataError
from model1.train.licences import distribution_licence
from model1.train.text_rules import CorpusRules, SeenWindows, refusal

Split = Literal["train", "heldout"]


class Document(NamedTuple):
    """One file of the corpus."""

    package: str
    path: str
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPackage:
    """Files that share an origin: `files` maps the path shown in the corpus to the file read."""

    name: str
    version: str
    licence: str
    files: tuple[tuple[str, Path], ...]


@dataclass(kw_only=True, slots=True)
class SourceRecord:
    """What the corpus took from one package; `skipped` counts left-out files by reason."""

    package: str
    version: str
    licence: str
    split: Split
    files: int = 0
    num_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Corpus(NamedTuple):
    """The selected documents of both splits, in selection order, and where they come from."""

    train: list[Document]
    heldout: list[Document]
    sources: list[SourceRecord]


def list_files(folder: str | Path, rules: CorpusRules) -> list[tuple[str, Path]]:
    """(relative path, file) of every file under `folder` with a wanted suffix, in path order.

    Folders named in `rules.skip_folders` are not entered. Raises DataError if the folder is
    missing or holds no such file.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"text folder {root} does not exist or is not a folder")
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix not in rules.suffixes or not path.is_file():
            continue
        if not rules.skip_folders.intersection(relative.parts[:-1]):
            found.append((relative.as_posix(), path))
    if not found:
        raise DataError(f"text folder {root} has no file ending in {sorted(rules.suffixes)}")
    return sorted(found)


def folder_package(
    folder: str | Path, rules: CorpusRules, *, name: str, version: str, licence: str
) -> TextPackage:
    """All text files under a folder as one package whose licence the caller states."""
    files = tuple(list_files(folder, rules))
    return TextPackage(name=name, version=version, licence=licence, files=files)


def installed_package(
    name: str, version: str, search: Sequence[str | Path], rules: CorpusRules
) -> TextPackage:
    """The text files that an installed distribution lists, with the licence of its metadata.

    `search` holds site-packages folders, tried in order. Raises DataError if no folder has this
    name and version, if the licence is not permissive, or if no listed file has a wanted suffix.
    """
    wanted = _normalised(name)
    for found in distributions(path=[str(s) for s in search]):
        public_version = found.version.split("+")[0]  # "+cpu" names a build, not other sources
        if _normalised(found.metadata["Name"]) != wanted or public_version != version:
            continue
        licence = distribution_licence(found)
        pairs = [(str(f), Path(str(found.locate_file(f)))) for f in found.files or []]
        files = tuple(sorted(p for p in pairs if _wanted_file(*p, rules)))
        if not files:
            raise DataError(f"package {name} {version} lists no file in {sorted(rules.suffixes)}")
        return TextPackage(name=wanted, version=version, licence=licence, files=files)
    raise DataError(f"package {name} {version} is not installed in {[str(s) for s in search]}")


def read_text(path: str | Path) -> str:
    """The text of one UTF-8 file. Raises DataError naming the file if it is anything else."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def build_corpus(
    packages: Sequence[TextPackage],
    rules: CorpusRules,
    *,
    held_out: frozenset[str] = frozenset(),
    on_bad_file: Literal["raise", "skip"] = "raise",
) -> Corpus:
    """Selects documents by the rules, without exact or near duplicates.

    held_out names whole packages for the held-out split; a training file that shares
    `rules.max_heldout_share` of its line windows with them is left out. on_bad_file "skip" counts
    files that are not UTF-8 instead of raising. Raises DataError if a held-out name is unknown or
    if nothing is selected.
    """
    unknown = held_out - {p.name for p in packages}
    if unknown:
        raise DataError(f"held-out packages {sorted(unknown)} are not among the packages given")
    corpus = Corpus([], [], [])
    filters = _Filters(rules)
    ordered = sorted(packages, key=lambda p: p.name not in held_out)  # stable: held-out first
    for package in ordered:
        split: Split = "heldout" if package.name in held_out else "train"
        record = SourceRecord(
            package=package.name, version=package.version, licence=package.licence, split=split
        )
        corpus.sources.append(record)
        for document in _readable(package, record, on_bad_file):
            reason = filters.refusal(document.text, split)
            if reason is not None:
                record.skipped[reason] += 1
                continue
            filters.add(document.text, split)
            (corpus.heldout if split == "heldout" else corpus.train).append(document)
            record.files += 1
            record.num_bytes += len(document.text.encode())
    if not corpus.train and not corpus.heldout:
        raise DataError(f"no usable text in {len(packages)} packages: {_reasons(corpus.sources)}")
    return corpus


def write_documents(path: str | Path, documents: Iterable[Document], *, preset: int = 6) -> int:
    """Writes one JSON object per line, xz-compressed; returns the size of the file in bytes.

    Keep documents sorted by package and path: neighbours then compress each other. Each object
    has the keys package, path and text; `model1.train.documents` reads them back.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(target, "wt", encoding="utf-8", newline="\n", preset=preset) as out:
        for document in documents:
            out.write(json.dumps(document._asdict(), ensure_ascii=False) + "\n")
    return target.stat().st_size


def source_table(sources: Sequence[SourceRecord]) -> list[dict[str, Any]]:
    """The records as plain dictionaries for a JSON file, ordered by split and package."""
    rows = sorted(sources, key=lambda r: (r.split, r.package))
    return [
        {
            "package": r.package,
            "version": r.version,
            "licence": r.licence,
            "split": r.split,
            "files": r.files,
            "bytes": r.num_bytes,
            "skipped": dict(sorted(r.skipped.items())),
        }
        for r in rows
    ]


def _readable(
    package: TextPackage, record: SourceRecord, on_bad_file: Literal["raise", "skip"]
) -> Iterator[Document]:
    for shown, path in package.files:
        try:
            text = read_text(path)
        except DataError:
            if on_bad_file == "raise":
                raise
            record.skipped["not readable as UTF-8"] += 1
            continue
        yield Document(package.name, shown, text)


class _Filters:
    """What has been selected so far, and whether one more text may join it."""

    def __init__(self, rules: CorpusRules) -> None:
        self._rules = rules
        self._digests: set[bytes] = set()
        self._windows: dict[Split, SeenWindows] = {"train": SeenWindows(), "heldout": SeenWindows()}

    def refusal(self, text: str, split: Split) -> str | None:
        if sha1(text.encode()).digest() in self._digests:
            return "exact duplicate"
        reason = refusal(text, self._rules)
        if reason is not None or split == "heldout":
            return reason
        if self._windows["heldout"].share(text) >= self._rules.max_heldout_share:
            return "repeats held-out text"
        if self._windows["train"].share(text) >= self._rules.max_near_duplicate_share:
            return "near duplicate"
        return None

    def add(self, text: str, split: Split) -> None:
        self._digests.add(sha1(text.encode()).digest())
        self._windows[split].add(text)


def _wanted_file(shown: str, path: Path, rules: CorpusRules) -> bool:
    parts = PurePosixPath(shown).parts
    if ".." in parts or path.suffix not in rules.suffixes or not path.is_file():
        return False
    return not rules.skip_folders.intersection(parts[:-1])


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503


def _reasons(sources: Sequence[SourceRecord]) -> dict[str, int]:
    return dict(sum((r.skipped for r in sources), Counter()))
