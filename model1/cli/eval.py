"""`model1 eval`: bits per byte of a checkpoint on held-out text, beside gzip and xz."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where the model runs."""

    CPU = "cpu"
    CUDA = "cuda"


class Precision(StrEnum):
    """How matrix products are computed."""

    FP32 = "fp32"
    BF16 = "bf16"


def evaluate(
    path: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    data: Annotated[
        list[Path], typer.Option(help="Folder of text or .jsonl.xz shard; repeatable.")
    ],
    seq_len: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 4096,
    stride: Annotated[
        int | None, typer.Option(help="Step between windows; default: seq-len, no overlap.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Rows of one forward pass.")] = 8,
    max_bytes: Annotated[
        int | None, typer.Option(help="Evaluate a fixed subset of at most so many bytes.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where the model runs.")] = Device.CPU,
    precision: Annotated[Precision, typer.Option(help="Of matrix products.")] = Precision.FP32,
    dense: Annotated[bool, typer.Option("--dense", help="Attend to every token.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print bits per byte for each package and in total."""
    from model1.evals.bits_per_byte import EvalSettings
    from model1.evals.report import evaluate_checkpoint, format_table

    settings = EvalSettings(
        seq_len=seq_len,
        stride=seq_len if stride is None else stride,
        batch_rows=batch_rows,
        precision=precision.value,
    )
    scores = evaluate_checkpoint(
        path, data, settings, device=device.value, max_bytes=max_bytes, dense=dense
    )
    print(json.dumps([s.to_dict() for s in scores]) if as_json else format_table(scores))
