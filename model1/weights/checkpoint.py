"""Writing a checkpoint: the Hugging Face layout, quantised storage, whole or not at all.

    config.json               ModelConfig plus "quantization", which says how tensors are stored
    generation_config.json    end and padding ids
    model.safetensors         or model-0000i-of-0000n.safetensors + model.safetensors.index.json
    tokenizer.json  tokenizer_config.json  chat_template.jinja
    MANIFEST.json             size and SHA-256 of every file; sources, licences, command, commit

`model1.weights.loading` reads it back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from model1.config import ModelConfig
from model1.errors import CheckpointError
from model1.tokenizer import Tokenizer
from model1.weights.atomic import atomic_directory, write_errors
from model1.weights.formats import StorageFormats, TableFormat, WeightFormat, encode_state
from model1.weights.match import check_specs, check_tokenizer, spec_of
from model1.weights.tensors import save_shards

CONFIG_NAME = "config.json"
GENERATION_NAME = "generation_config.json"
PROVENANCE_KEYS = ("sources", "licences", "command", "commit")
MAX_SHARD_BYTES = 12_000_000  # small enough for a plain git repository


def save_checkpoint(
    directory: str | Path,
    state: Mapping[str, Tensor],
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | str | Path,
    provenance: Mapping[str, Any],
    weight_format: WeightFormat = "fp8",
    table_format: TableFormat = "fp8",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a checkpoint that `load_model` reads, and return its directory.

    state: the model's `state_dict()`, any device and float dtype. tokenizer: an instance or the
    directory of one. provenance: JSON data with at least PROVENANCE_KEYS. Files are written beside
    `directory`, flushed and renamed: an existing checkpoint stays readable until the new one is
    complete, and nothing is left on failure.

    Raises CheckpointError for NaN or infinity, tensors or a tokenizer that do not fit the config,
    missing provenance, a target that is not a checkpoint, or a failed write; TokenizerError.
    """
    missing = [key for key in PROVENANCE_KEYS if key not in provenance]
    if missing:
        raise CheckpointError(f"provenance must have the key {missing[0]!r}")
    formats = StorageFormats(weights=weight_format, tables=table_format)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_dir(tokenizer)
    check_tokenizer(config, tokenizer)
    found = {name: spec_of(tensor) for name, tensor in state.items()}
    check_specs(found, config, tokenizer, lambda _: "the state to save")
    entries = encode_state(state, formats)
    with atomic_directory(directory, provenance=provenance) as temporary:
        with write_errors(Path(directory)):
            tokenizer.save(temporary)
            _write_json(
                temporary / CONFIG_NAME,
                {**config.to_dict(), "quantization": dataclasses.asdict(formats)},
            )
            _write_json(temporary / GENERATION_NAME, _generation_config(tokenizer))
        save_shards(temporary, entries, max_shard_bytes=max_shard_bytes)
    return Path(directory)


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "do_sample": True,
        "eos_token_id": sorted(tokenizer.stop_token_ids),
        "pad_token_id": tokenizer.pad_token_id,
    }


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
