"""The `model1` command: one verb per module, imported only when it is used.

Exit codes: 0 done, 2 wrong usage, 1 a runtime error told in one sentence on stderr, 130 Ctrl-C.
A verb is a plain function with typer annotations in `model1/cli/<verb>.py`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import typer

from model1.errors import Model1Error

# verb -> (module, function in it, help line shown by `model1 --help`)
VERBS: dict[str, tuple[str, str, str]] = {
    "serve": ("model1.cli.serve", "serve", "Serve a checkpoint over the OpenAI HTTP API."),
    "generate": ("model1.cli.generate", "generate", "Complete a prompt, or standard input."),
    "chat": ("model1.cli.chat", "chat", "Talk to a checkpoint in the terminal."),
    "train": ("model1.cli.train", "train", "Train a model from a TOML file."),
    "eval": ("model1.cli.eval", "evaluate", "Measure bits per byte on text files."),
    "info": ("model1.cli.info", "info", "Show a checkpoint, its sizes and this machine."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code; usage errors and `--help` leave by SystemExit."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        build_app(args[0] if args else None)(args, prog_name="model1")
    except Model1Error as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return 1
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    return 0


def build_app(verb: str | None = None) -> typer.Typer:
    """The application with `verb` alone, or with names and help of all when it is none of them."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        help="Model1: train, run and serve a small language model on one machine.",
    )
    app.callback()(_root)
    for name in [verb] if verb in VERBS else VERBS:
        module_name, function, help_line = VERBS[name]
        # The overview must not import what the verbs need: it would take seconds.
        command = getattr(importlib.import_module(module_name), function) if verb == name else _root
        app.command(name, help=help_line)(command)
    return app


def _root() -> None:
    """Give typer a root, so that a single verb keeps its name on the command line."""


def _one_line(text: str) -> str:
    return " ".join(text.split())
