from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model1.errors import CheckpointError
from model1.weights.tensors import (
    INDEX_NAME,
    SINGLE_NAME,
    load_shards,
    load_tensors,
    save_shards,
    save_tensors,
)

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
    torch.uint8,
    torch.int64,
    torch.bool,
]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw(a), raw(b))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def sample() -> dict[str, torch.Tensor]:
    return {
        f"t{i}": torch.randint(0, 2, (40 * (i + 1), 33)).to(torch.uint8).to(dtype)
        for i, dtype in enumerate(DTYPES[:3] + DTYPES[4:])
    } | {"e8": torch.arange(64, dtype=torch.uint8).view(torch.float8_e8m0fnu).view(8, 8)}


def test_round_trip_is_bitwise(tmp_path: Path) -> None:
    tensors = sample() | {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    assert all(same(loaded[name], tensors[name]) for name in tensors)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == 0o644


def test_views_and_shared_storage(tmp_path: Path) -> None:
    base = torch.randn(10, 12)
    tensors = {"a": base, "b": base, "c": base.T, "d": base[3:5], "e": base[:, ::2]}
    save_tensors(tmp_path / "x.safetensors", tensors)
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_loaded_tensors_do_not_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": torch.ones(100_000)})
    loaded = load_tensors(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    assert loaded["a"].sum() == 100_000


@settings(max_examples=12, deadline=None)
@given(
    limit=st.integers(2_000, 40_000),
    sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12),
)
def test_no_shard_exceeds_the_limit(
    tmp_path_factory: pytest.TempPathFactory, limit: int, sizes: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    tensors = {f"layers.{i}.weight": torch.randn(size, 64) for i, size in enumerate(sizes)}
    save_shards(directory, tensors, max_shard_bytes=limit)
    assert all(f.stat().st_size <= limit for f in directory.glob("*.safetensors"))
    loaded = load_shards(directory).tensors
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_single_file_has_no_index(tmp_path: Path) -> None:
    save_shards(tmp_path, sample(), max_shard_bytes=1_000_000)
    assert [f.name for f in tmp_path.iterdir()] == [SINGLE_NAME]
    assert set(load_shards(tmp_path).files.values()) == {tmp_path / SINGLE_NAME}


def test_index_is_hugging_faces(tmp_path: Path) -> None:
    tensors = sample()
    save_shards(tmp_path, tensors, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX_NAME).read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert all(same(load_shards(tmp_path).tensors[name], tensors[name]) for name in tensors)


def test_row_larger_than_a_shard(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"too small for one row of tensor wide .*\[2, 5000\]"
    ):
        save_shards(tmp_path, {"wide": torch.zeros(2, 5000)}, max_shard_bytes=10_000)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_shards(tmp_path, {"a": torch.ones(50, 64), "b": torch.ones(9)}, max_shard_bytes=8000)
    return tmp_path


def edit_index(directory: Path, **changes: str | None) -> None:
    path = directory / INDEX_NAME
    index = json.loads(path.read_text(encoding="utf-8"))
    for name, file in changes.items():
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    path.write_text(json.dumps(index), encoding="utf-8")


def test_dropped_shard(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_shards(sharded)


def test_index_that_names_too_much_or_too_little(sharded: Path) -> None:
    edit_index(sharded, c="model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001.* lacks tensor c"):
        load_shards(sharded)
    edit_index(sharded, c=None, b=None)
    with pytest.raises(CheckpointError, match=r"model-00002.* holds the unlisted tensor b"):
        load_shards(sharded)


def test_index_that_points_outside(sharded: Path) -> None:
    edit_index(sharded, b="../x.safetensors")
    with pytest.raises(CheckpointError, match="not a file name"):
        load_shards(sharded)


def test_missing_part(tmp_path: Path) -> None:
    save_tensors(tmp_path / SINGLE_NAME, {"a#1of2": torch.ones(2)})
    with pytest.raises(CheckpointError, match="found 1 of 2 parts of tensor a"):
        load_shards(tmp_path)
    save_tensors(tmp_path / SINGLE_NAME, {"a#x": torch.ones(2)})
    with pytest.raises(CheckpointError, match="a#x is not a part"):
        load_shards(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"\x10" + b"\0" * 7 + b"{" * 16])
def test_not_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors"):
        load_shards(tmp_path)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        load_shards(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot write .*x\.safetensors"):
        save_tensors(tmp_path / "no" / "x.safetensors", {"a": torch.ones(1)})
