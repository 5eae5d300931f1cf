"""`model1 serve`: a checkpoint behind the OpenAI HTTP API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from model1.cli.flags import Flag, from_flags, with_flags
from model1.engine.config import EngineConfig
from model1.serve.config import ServeConfig

ENGINE_FLAGS = {
    "max_model_len": Flag(help="Most tokens of one request, prompt and answer."),
    "max_num_seqs": Flag(help="Most sequences computed in one step."),
    "max_num_batched_tokens": Flag(help="Most tokens computed in one step."),
    "kv_cache_dtype": Flag(help="How cached tokens are stored."),
    "dtype": Flag(help="How weights and activations are computed."),
    "device": Flag(help="Where the model runs."),
    "backend": Flag(help="What runs attention: auto, ref, triton or a plug-in's name."),
}
SERVE_FLAGS = {
    "host": Flag(help="Address to listen on."),
    "port": Flag(help="Port to listen on; 0 takes a free one."),
    "served_model_name": Flag(help="Model name in the API; default: the folder's name."),
    "api_key": Flag(help="Key that clients must send; default: none.", envvar="MODEL1_API_KEY"),
    "shutdown_timeout": Flag(help="Seconds that running requests get after SIGTERM."),
    "log_level": Flag(help="Least severe level that is logged."),
}


@with_flags((ServeConfig, SERVE_FLAGS), (EngineConfig, ENGINE_FLAGS))
def serve(
    path: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder; default: the shipped one.")
    ] = None,
    **values: Any,
) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    serve_config = from_flags(ServeConfig, SERVE_FLAGS, values)
    engine_config = from_flags(EngineConfig, ENGINE_FLAGS, values)
    from model1.serve.launch import launch

    launch(path, engine_config, serve_config)
