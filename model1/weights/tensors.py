"""Named tensors in safetensors files: one file, or shards of limited size with an index.

safetensors writes its files with mode 0600 and without fsync; both are put right here. Loaded
tensors own their memory, so nothing changes under a running model when a file is overwritten.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model1.errors import CheckpointError
from model1.weights.atomic import FILE_MODE, sync, write_errors
from model1.weights.manifest import read_json

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Upper bounds of what a safetensors header adds: per file the length word, the metadata and
# padding; per tensor its JSON entry without the name.
_FILE_OVERHEAD_BYTES = 128
_ENTRY_OVERHEAD_BYTES = 160


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to one safetensors file, mode 0644, flushed to the disk.

    Any device, any strides, shared storage allowed (each name gets its own copy). Raises
    CheckpointError naming the file when it cannot be written.
    """
    path = Path(path)
    with write_errors(path):
        save_file(_own_memory(tensors), path, metadata={"format": "pt"})
        path.chmod(FILE_MODE)
        sync(path)


def load_tensors(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of one safetensors file to the CPU; CheckpointError names a bad file."""
    return dict(_iter_tensors(Path(path)))


def save_shards(directory: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int) -> None:
    """Write model.safetensors, or numbered shards of at most max_shard_bytes plus their index.

    A tensor that does not fit into one shard is cut along its first axis into parts named
    `name#1of3`. Raises CheckpointError when a single row of a tensor does not fit.
    """
    parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        parts.update(_split(name, tensor, max_shard_bytes))
    shards = _pack(parts, max_shard_bytes)
    if len(shards) == 1:
        save_tensors(directory / SINGLE_NAME, shards[0])
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, shards, strict=True):
        save_tensors(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total_bytes = sum(tensor.nbytes for tensor in parts.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    with write_errors(directory / INDEX_NAME):
        (directory / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Shards(NamedTuple):
    """Tensors of a checkpoint and, for messages, the file that each came from."""

    tensors: dict[str, Tensor]
    files: dict[str, Path]


def load_shards(directory: Path) -> Shards:
    """Read what `save_shards` wrote, parts joined.

    Raises CheckpointError naming file and tensor when a shard is missing or unreadable, or when
    its tensors are not exactly those that the index assigns to it.
    """
    single = directory / SINGLE_NAME
    if single.is_file():
        tensors = _join(load_tensors(single), single)
        return Shards(tensors, dict.fromkeys(tensors, single))
    index = directory / INDEX_NAME
    if not index.is_file():
        raise CheckpointError(f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}")
    weight_map = _read_weight_map(index)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(weight_map.values())):
        shard = load_tensors(directory / file)
        assigned = {name for name, owner in weight_map.items() if owner == file}
        for name in sorted(assigned ^ set(shard)):
            fault = "lacks" if name in assigned else "holds the unlisted"
            raise CheckpointError(f"{directory / file} {fault} tensor {name}")
        tensors.update(shard)
    tensors = _join({name: tensors[name] for name in weight_map}, index)
    files = {name.partition("#")[0]: directory / file for name, file in weight_map.items()}
    return Shards(tensors, files)


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map: Any = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} must hold the object 'weight_map'")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index} assigns tensor {name} to {file!r}, not a file name")
    return weight_map


def _iter_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt", device="cpu") as stream:
            for name in stream.keys():  # noqa: SIM118  (not a dict)
                yield name, stream.get_tensor(name).clone()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error


def _own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share storage (safetensors refuses those)."""
    owned: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(pointer)
        owned[name] = tensor
    return owned


def _cost_bytes(name: str, tensor: Tensor) -> int:
    """Most bytes that the tensor can add to a file."""
    return tensor.nbytes + len(name.encode()) + _ENTRY_OVERHEAD_BYTES


def _pack(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    """Fill shards in the given order; always at least one."""
    shards: list[dict[str, Tensor]] = [{}]
    room = max_shard_bytes - _FILE_OVERHEAD_BYTES
    for name, tensor in tensors.items():
        cost = _cost_bytes(name, tensor)
        if cost > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes - _FILE_OVERHEAD_BYTES
        shards[-1][name] = tensor
        room -= cost
    return shards


def _split(name: str, tensor: Tensor, max_shard_bytes: int) -> Iterable[tuple[str, Tensor]]:
    room = max_shard_bytes - _FILE_OVERHEAD_BYTES - _cost_bytes(name + "#000of000", tensor[:0])
    if tensor.nbytes <= room:
        return [(name, tensor)]
    rows_per_part = 0 if tensor.ndim == 0 else room // (tensor.nbytes // len(tensor))
    if rows_per_part < 1:
        raise CheckpointError(
            f"max_shard_bytes {max_shard_bytes} is too small for one row of tensor {name} "
            f"with shape {list(tensor.shape)}"
        )
    parts = torch.split(tensor, rows_per_part)
    return [(f"{name}#{i + 1}of{len(parts)}", part) for i, part in enumerate(parts)]


def _join(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Put the parts of split tensors together again."""
    whole: dict[str, Tensor] = {}
    parts: dict[tuple[str, int], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        base, mark, place = name.partition("#")
        if not mark:
            whole[name] = tensor
            continue
        number, _, count = place.partition("of")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise CheckpointError(f"{source}: tensor {name} is not a part like name#1of3")
        parts.setdefault((base, int(count)), {})[int(number)] = tensor
    for (base, count), found in parts.items():
        if len(found) != count or base in whole:
            raise CheckpointError(f"{source}: found {len(found)} of {count} parts of tensor {base}")
        whole[base] = torch.cat([found[i + 1] for i in range(count)])
    return whole
