"""Turn the final folder of a training run into a checkpoint to ship: FP8 matrices, 4-bit rows.

    python tools/export_checkpoint.py runs/code_small_chat/final checkpoints/code_small \
        --sources .data/SOURCES.json --command "model1 train ..." --commit HASH

`--sources` is the table that `tools/build_corpus.py` writes; it goes into the manifest with the
licence of each package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.models import load_trained
from model1.weights import save_checkpoint

MAX_SHARD_BYTES = 12_000_000


def provenance(sources: Path, command: str, commit: str) -> dict[str, object]:
    """What the manifest says about where the weights come from."""
    table = json.loads(sources.read_text(encoding="utf-8"))
    rows = [
        {key: row[key] for key in ("package", "version", "licence", "split", "files", "bytes")}
        for row in table
    ]
    licences = sorted({row["licence"] for row in rows})
    return {"sources": rows, "licences": licences, "command": command, "commit": commit}


def main() -> None:
    """Export one run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--sources", type=Path, required=True)
    parser.add_argument("--command", required=True)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    tokenizer = Tokenizer.from_dir(options.run)
    model = load_trained(options.run, tokenizer)
    if not isinstance(model, Model):
        parser.error(f"{options.run} does not hold a Model1")
    save_checkpoint(
        options.target,
        dict(model.state_dict()),
        model.config,
        tokenizer=tokenizer,
        provenance=provenance(options.sources, options.command, options.commit),
        weight_format="fp8",
        table_format="fp4",
        max_shard_bytes=MAX_SHARD_BYTES,
    )
    size = sum(path.stat().st_size for path in options.target.iterdir())
    print(f"{options.target}: {size:,} bytes")


if __name__ == "__main__":
    main()
