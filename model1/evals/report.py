"""Running the bits-per-byte measurement on a checkpoint folder, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from model1.evals.bits_per_byte import EvalSettings, Score, bits_per_byte, subset
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.documents import read_documents
from model1.train.loss import Trainable
from model1.train.models import load_trained
from model1.weights.device import resolve_device


def evaluate_checkpoint(
    path: str | Path,
    sources: Sequence[str | Path],
    settings: EvalSettings,
    *,
    device: str = "cpu",
    max_bytes: int | None = None,
    dense: bool = False,
) -> list[Score]:
    """Scores of a checkpoint (Model1 or plain) on text sources. Errors: any `Model1Error`.

    dense: every Model1 layer attends to all visible tokens, whatever its sparse configuration.
    """
    target = resolve_device(device)
    tokenizer = Tokenizer.from_dir(path)
    model = load_trained(Path(path), tokenizer).to(target).eval()
    if isinstance(model, Model):
        model.dense_attention = dense
    documents = subset(read_documents(sources), max_bytes)
    return bits_per_byte(cast(Trainable, model), tokenizer, documents, settings, device=target)


def format_table(scores: Sequence[Score]) -> str:
    """Bits per byte as text, one line a package; compressors as one stream and file by file."""
    header = ("package", "files", "bytes", "model", "gzip -9", "xz -9e", "gzip/file", "xz/file")
    lines: list[tuple[str, ...]] = [header]
    for s in scores:
        compressed = (s.gzip_bytes, s.xz_bytes, s.gzip_files_bytes, s.xz_files_bytes)
        bits = [f"{value:.4f}" for value in (s.model, *map(s.bits, compressed))]
        lines.append((s.name, f"{s.num_documents:,}", f"{s.num_bytes:,}", *bits))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
