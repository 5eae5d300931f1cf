"""`python -m model1.train CONFIG.toml`: the trainer without the command-line package."""

from __future__ import annotations

import argparse
import sys

from model1.errors import Model1Error
from model1.train.config import load_train_config
from model1.train.loop import Trainer


def main(arguments: list[str] | None = None) -> int:
    """Run one training; exit code 0, or 1 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m model1.train", description=__doc__)
    parser.add_argument("config", help="TOML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    parser.add_argument("--stop-after-seconds", type=float, help="save and end this sitting then")
    options = parser.parse_args(arguments)
    try:
        config = load_train_config(options.config, options.set)
        Trainer(config, resume=options.resume).run(stop_after_seconds=options.stop_after_seconds)
    except Model1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
