"""Builds the Python-source corpus of the shipped checkpoint from installed packages.

    pip install --no-deps --target PACKAGES -r tools/corpus_packages.txt
    python tools/build_corpus.py --search PACKAGES --out .data

Text is the standard library of the running interpreter (recorded with its version) plus the
packages of corpus_packages.txt, each refused unless its metadata names a permissive licence.
Writes train.jsonl.xz and heldout.jsonl.xz (one {"package", "path", "text"} object per line,
sorted by package and path) and SOURCES.json (package, version, licence, split, files, bytes,
and why files were left out). Downloads nothing. The same inputs give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import sysconfig
from dataclasses import replace
from pathlib import Path

from model1.train.corpus import (
    Corpus,
    TextPackage,
    build_corpus,
    folder_package,
    installed_package,
    source_table,
    write_documents,
)
from model1.train.text_rules import CorpusRules

# whole packages kept for evaluation: standard library and third party, diverse in style
HELD_OUT_STDLIB = ("asyncio", "email", "json")
HELD_OUT_PACKAGES = ("attrs", "flask", "jsonschema", "tornado", "trio")


def parse_requirements(path: Path) -> list[tuple[str, str]]:
    """(name, version) for each `name==version` line; blank lines and # comments are skipped."""
    lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [(name, version) for name, _, version in (ln.partition("==") for ln in lines if ln)]


def stdlib_packages(folder: Path, rules: CorpusRules) -> list[TextPackage]:
    """The standard library as one training package and one package per held-out folder.

    The tests of held-out folders belong to neither, since they quote what they test.
    """
    whole = folder_package(
        folder, rules, name="cpython", version=platform.python_version(), licence="PSF-2.0"
    )
    parts: dict[str, list[tuple[str, Path]]] = {name: [] for name in ("", *HELD_OUT_STDLIB)}
    for shown, path in whole.files:
        top, _, rest = shown.partition("/")
        if top in HELD_OUT_STDLIB:
            parts[top].append((shown, path))
        elif not (top == "test" and rest.startswith(tuple(f"test_{n}" for n in HELD_OUT_STDLIB))):
            parts[""].append((shown, path))
    return [
        replace(whole, name=f"cpython-{name}" if name else "cpython", files=tuple(files))
        for name, files in parts.items()
    ]


def collect(args: argparse.Namespace) -> Corpus:
    """Reads, filters and splits everything that the arguments name."""
    rules = CorpusRules()
    packages = stdlib_packages(args.stdlib, rules)
    for name, version in parse_requirements(args.packages):
        packages.append(installed_package(name, version, args.search, rules))
    held_out = frozenset([*HELD_OUT_PACKAGES, *(f"cpython-{n}" for n in HELD_OUT_STDLIB)])
    # the standard library's tests hold files that are deliberately not UTF-8
    return build_corpus(packages, rules, held_out=held_out, on_bad_file="skip")


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default_list = Path(__file__).with_name("corpus_packages.txt")
    parser.add_argument("--packages", type=Path, default=default_list, help="name==version lines")
    parser.add_argument("--search", type=Path, action="append", required=True)
    parser.add_argument("--stdlib", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    corpus = collect(args)
    args.out.mkdir(parents=True, exist_ok=True)
    table = json.dumps(source_table(corpus.sources), indent=1) + "\n"
    (args.out / "SOURCES.json").write_text(table, encoding="utf-8")
    for split, documents in (("heldout", corpus.heldout), ("train", corpus.train)):
        target = args.out / f"{split}.jsonl.xz"
        num_packed = write_documents(target, sorted(documents))
        num_bytes = sum(len(d.text.encode()) for d in documents)
        print(f"{target}: {len(documents)} files, {num_bytes} bytes of text, {num_packed} packed")


if __name__ == "__main__":
    main()
