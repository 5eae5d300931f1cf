"""`model1 chat`: a conversation in the terminal."""

from __future__ import annotations

import io
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from model1.cli.flags import from_flags, with_flags
from model1.cli.local import ENGINE_FLAGS, load, stream
from model1.engine.config import EngineConfig
from model1.engine.request import SamplingParams
from model1.errors import DataError, EngineError, RequestError, TokenizerError

if TYPE_CHECKING:
    from model1.engine.llm import LLM

HELP = "/reset forgets the conversation, /system TEXT sets instructions, /exit leaves"


@with_flags((EngineConfig, ENGINE_FLAGS))
def chat(
    path: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; default: the shipped one.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Instructions before the first turn.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of one answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens drawn from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes drawn answers repeatable.")] = None,
    **values: Any,
) -> None:
    """Talk until /exit or the end of the input; Ctrl-C cuts an answer short."""
    params = from_flags(
        SamplingParams,
        (),
        {},
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    config = from_flags(EngineConfig, ENGINE_FLAGS, values, max_num_seqs=1)
    conversation = Conversation(load(path, config), params, system)
    print(HELP, file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Some locales would let bytes that are not UTF-8 through as lone surrogates.
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8: {error.reason}") from error
        if line == "/exit":
            return
        if line.startswith("/"):
            conversation.command(line)
        elif line:
            conversation.ask(line)


class Conversation:
    """The turns so far and the model that answers them."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._params = params
        self._system = system
        self._turns: list[dict[str, str]] = []

    def command(self, line: str) -> None:
        """Carry out a line that starts with a slash."""
        name, _, text = line.partition(" ")
        if name == "/reset":
            self._turns.clear()
        elif name == "/system":
            self._system = text.strip() or None
        else:
            print(HELP, file=sys.stderr)

    def ask(self, question: str) -> None:
        """Print the answer as it is made; a question that fails is forgotten."""
        self._turns.append({"role": "user", "content": question})
        system = [{"role": "system", "content": self._system}] if self._system else []
        answer: list[str] = []
        try:
            token_ids = self._llm.tokenizer.apply_chat_template([*system, *self._turns])
            with closing(stream(self._llm, token_ids, self._params)) as outputs:
                for output in outputs:
                    answer.append(output.text)
                    print(output.text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # the part that was shown stays in the conversation
        except (RequestError, TokenizerError, EngineError) as error:
            self._turns.pop()
            print(f"error: {error}; /reset starts anew", file=sys.stderr)
            return
        print()
        self._turns.append({"role": "assistant", "content": "".join(answer)})
