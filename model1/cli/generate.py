"""`model1 generate`: one prompt, one completion, streamed to standard output."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from model1.cli.flags import from_flags, with_flags
from model1.cli.local import ENGINE_FLAGS, load, stream, utf8
from model1.engine.config import EngineConfig
from model1.engine.request import RequestOutput, SamplingParams


@with_flags((EngineConfig, ENGINE_FLAGS))
def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; left out or '-': standard input.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder; default: the shipped one.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the likeliest tokens drawn from.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes a drawn answer repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this; repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    **values: Any,
) -> None:
    """Print the continuation, without the prompt."""
    params = from_flags(
        SamplingParams,
        (),
        {},
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
    )
    config = from_flags(EngineConfig, ENGINE_FLAGS, values, max_num_seqs=1)
    text = _read_prompt(prompt)
    llm = load(model, config)
    token_ids = llm.tokenizer.encode(text)
    start = time.perf_counter()
    parts: list[RequestOutput] = []
    for output in stream(llm, token_ids, params):
        parts.append(output)
        if not as_json:
            print(output.text, end="", flush=True)
    print(json.dumps(_report(parts, time.perf_counter() - start)) if as_json else "")


def _read_prompt(prompt: str | None) -> str:
    if prompt is not None and prompt != "-":
        return utf8(os.fsencode(prompt), "the prompt")
    if sys.stdin.isatty():
        raise typer.BadParameter("give a prompt as argument or on standard input")
    return utf8(sys.stdin.buffer.read(), "standard input")


def _report(parts: list[RequestOutput], seconds: float) -> dict[str, object]:
    last = parts[-1]
    return {
        "text": "".join(part.text for part in parts),
        "finish_reason": last.finish_reason,
        "prompt_tokens": last.num_prompt_tokens,
        "completion_tokens": last.num_generated_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(last.num_generated_tokens / seconds, 1),
    }
