"""From a checkpoint folder to a running server."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from pathlib import Path

from model1.engine.config import EngineConfig
from model1.engine.llm import LLM
from model1.serve import log
from model1.serve.config import ServeConfig
from model1.serve.plan import ServedModel
from model1.serve.server import bind, serve
from model1.weights import default_checkpoint

logger = logging.getLogger(__name__)


def launch(path: Path | None, engine_config: EngineConfig, config: ServeConfig) -> None:
    """Serve the checkpoint at `path` (None: the shipped one) until a signal ends it.

    Raises ConfigError for a port in use, CheckpointError or DeviceError when loading fails.
    """
    log.configure(config.log_level)
    # Before the checkpoint is loaded: a port in use is told at once.
    with bind(config.host, config.port) as sock:
        start = time.monotonic()
        path = default_checkpoint() if path is None else path
        options = {f.name: getattr(engine_config, f.name) for f in dataclasses.fields(EngineConfig)}
        llm = LLM(path, **options)
        engine = llm.engine
        name = config.served_model_name or path.resolve().name
        logger.info(
            "loaded %s in %.1f s: context %d tokens, %d KV bytes per token",
            name,
            time.monotonic() - start,
            engine.max_model_len,
            engine.bytes_per_token,
        )
        model = ServedModel(name, llm.tokenizer, engine.max_model_len, engine.bytes_per_token)
        came_to_rest = serve(engine, model, config, sock)
    if not came_to_rest:
        # Python would end the thread inside PyTorch's C++ code, which aborts the process.
        logger.warning("leaving while a model step runs; its requests have been answered")
        logging.shutdown()
        os._exit(0)
