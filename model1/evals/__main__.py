"""`python -m model1.evals PATH --data SOURCE`: bits per byte without the command-line package."""

from __future__ import annotations

import argparse
import json
import sys

from model1.errors import Model1Error
from model1.evals.bits_per_byte import EvalSettings
from model1.evals.report import evaluate_checkpoint, format_table


def main(arguments: list[str] | None = None) -> int:
    """Print the table (or JSON); exit code 0, or 1 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m model1.evals", description=__doc__)
    parser.add_argument("path", help="checkpoint folder")
    parser.add_argument("--data", action="append", required=True, help="text source; repeatable")
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--stride", type=int, help="default: seq-len, windows do not overlap")
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--max-bytes", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--dense", action="store_true", help="switch sparse attention off")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        settings = EvalSettings(
            seq_len=options.seq_len,
            stride=options.stride or options.seq_len,
            batch_rows=options.batch_rows,
            precision=options.precision,
        )
        scores = evaluate_checkpoint(
            options.path, options.data, settings,
            device=options.device, max_bytes=options.max_bytes, dense=options.dense,
        )  # fmt: skip
    except Model1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps([s.to_dict() for s in scores]) if options.json else format_table(scores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
