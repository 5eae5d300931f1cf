"""`model1 train`: one training run from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the run, such as configs/tiny.toml")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key; repeatable."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint.")
    ] = False,
    stop_after_seconds: Annotated[
        float | None, typer.Option(help="Save and end this sitting after so long.")
    ] = None,
) -> None:
    """Train to the end of the schedule; the model is in out_dir/final, the log beside it."""
    from model1.train.config import load_train_config
    from model1.train.loop import Trainer

    run = load_train_config(config, overrides or ())
    Trainer(run, resume=resume).run(stop_after_seconds=stop_after_seconds)
