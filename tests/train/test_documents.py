from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from model1.errors import DataError
from model1.train.documents import read_documents


def shard(path: Path, *lines: str) -> Path:
    path.write_bytes(lzma.compress("".join(line + "\n" for line in lines).encode()))
    return path


def line(package: str, path: str, text: str) -> str:
    return json.dumps({"package": package, "path": path, "text": text})


def test_a_folder_gives_sorted_text_with_packages(tmp_path: Path) -> None:
    for name in ("b/two.py", "a/one.py", "top.py", "a/.hidden/x.py", "a/data.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "a/empty.py").write_text("")
    found = [(d.package, d.path, d.text) for d in read_documents([tmp_path])]
    assert found == [
        ("a", "a/one.py", "a/one.py"),
        ("b", "b/two.py", "b/two.py"),
        (tmp_path.name, "top.py", "top.py"),
    ]


def test_shards_are_read_alone_or_from_their_folder(tmp_path: Path) -> None:
    first = shard(tmp_path / "a.jsonl.xz", line("p", "x.py", "é\n"), line("p", "y.py", ""))
    shard(tmp_path / "b.jsonl.xz", line("q", "z.py", "2"))
    assert [d.text for d in read_documents([first])] == ["é\n"]
    assert [d.package for d in read_documents([tmp_path])] == ["p", "q"]


def test_bytes_that_are_not_utf8_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "good.py").write_text("x")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.py is not UTF-8 text \(byte 3\)"):
        list(read_documents([tmp_path]))


def test_an_empty_or_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no"):
        list(read_documents([tmp_path]))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(DataError, match="hold no text"):
        list(read_documents([tmp_path]))
    with pytest.raises(DataError, match="does not exist"):
        list(read_documents([tmp_path / "absent"]))
    with pytest.raises(DataError, match="neither a folder nor"):
        list(read_documents([tmp_path / "empty.py"]))


def test_a_broken_shard_is_named_with_its_line(tmp_path: Path) -> None:
    bad = shard(tmp_path / "bad.jsonl.xz", line("p", "x.py", "1"), '{"package": "p"}')
    with pytest.raises(DataError, match=r"bad\.jsonl\.xz line 2 must be"):
        list(read_documents([bad]))
    shard(bad, line("p", "x.py", "1"))
    bad.write_bytes(bad.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"bad\.jsonl\.xz is not a whole xz file"):
        list(read_documents([bad]))
