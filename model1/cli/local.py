"""What `generate` and `chat` share: flags of the local engine and streaming from it."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Generator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from model1.cli.flags import Flag
from model1.errors import DataError, EngineError

if TYPE_CHECKING:
    from model1.engine.config import EngineConfig
    from model1.engine.llm import LLM
    from model1.engine.request import RequestOutput, SamplingParams

ENGINE_FLAGS = {
    "device": Flag(help="Where the model runs."),
    "dtype": Flag(help="How weights and activations are computed."),
    "kv_cache_dtype": Flag(help="How cached tokens are stored."),
    "max_model_len": Flag(help="Most tokens of one request, prompt and answer."),
    "backend": Flag(help="What runs attention: auto, ref, triton or a plug-in's name."),
}
_request_ids = itertools.count()


def load(path: Path | None, config: EngineConfig) -> LLM:
    """The checkpoint at `path` (None: the shipped one)."""
    from model1.engine.llm import LLM

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return LLM(path, **{field.name: getattr(config, field.name) for field in fields(config)})


def stream(llm: LLM, token_ids: Sequence[int], params: SamplingParams) -> Generator[RequestOutput]:
    """Outputs of one request as they come; closing the iterator aborts the request.

    Raises RequestError when the request is refused, EngineError when generation fails.
    """
    request_id = f"cli-{next(_request_ids)}"
    llm.engine.add_request(request_id, token_ids, params)
    try:
        while True:
            for output in llm.engine.step():
                if output.request_id != request_id:
                    continue  # the last output of an aborted request
                if output.finish_reason == "error":
                    raise EngineError(output.error or "generation failed")
                yield output
                if output.finished:
                    return
    finally:
        llm.engine.abort(request_id)


def utf8(raw: bytes, source: str) -> str:
    """Text of `raw`; DataError when it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8: {error.reason} at byte {error.start}") from error
