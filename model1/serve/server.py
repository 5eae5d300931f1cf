"""Running the HTTP server: the socket, the ready line, and an orderly end.

On SIGTERM or SIGINT the server stops accepting, lets running requests finish for up to
`shutdown_timeout` seconds, ends the rest with an error, and returns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shlex
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType

import orjson
import uvicorn

from model1.errors import ConfigError
from model1.serve.app import create_app
from model1.serve.config import ServeConfig
from model1.serve.connection import timed_protocol
from model1.serve.plan import ServedModel
from model1.serve.worker import AsyncEngine, EngineLike

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 30
ERROR_FLUSH_S = 2  # after the drain, for the last error events to leave


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet; a port in use is a ConfigError.

    Called before the checkpoint is loaded, so that the user hears of a conflict at once.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with contextlib.ExitStack() as undo:
            sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            undo.pop_all()
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    return sock


def _cannot_listen(host: str, port: int, error: OSError) -> ConfigError:
    reason = (error.strerror or str(error)).lower()
    return ConfigError(f"cannot listen on {host} port {port}: {reason}")


def serve(engine: EngineLike, model: ServedModel, config: ServeConfig, sock: socket.socket) -> bool:
    """Serve on `sock` until SIGTERM or SIGINT; raises ConfigError if it cannot listen.

    Returns whether the engine came to rest; if not, a long step still runs in its daemon thread.
    """
    host, port = sock.getsockname()[:2]
    try:
        sock.listen(config.limits.max_connections)
    except OSError as error:
        raise _cannot_listen(host, port, error) from error
    limits = config.limits
    worker = AsyncEngine(
        engine, max_active=limits.max_active_sequences, hang_timeout_s=limits.hang_timeout_s
    )
    options = uvicorn.Config(
        create_app(worker, model, config),
        http=timed_protocol(limits.header_timeout_s),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=limits.max_header_bytes,
        limit_concurrency=limits.max_connections,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(config.shutdown_timeout) + ERROR_FLUSH_S + 1,
    )
    announce = _ready_lines(host, port, model.name, has_key=config.api_key is not None)
    DrainingServer(options, worker, config.shutdown_timeout, announce).run(sockets=[sock])
    return not worker.is_running


class DrainingServer(uvicorn.Server):
    """uvicorn's server with a drain that ends in error answers instead of cut connections."""

    def __init__(
        self, config: uvicorn.Config, worker: AsyncEngine, drain_s: float, announce: list[str]
    ) -> None:
        super().__init__(config)
        self._worker = worker
        self._drain_s = drain_s
        self._announce = announce

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while serving; unlike uvicorn's, does not raise them again at the end."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        handled = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the drain; a second signal ends it."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections and say so."""
        await super().startup(sockets=sockets)
        if self.started:
            for line in self._announce:
                logger.info("%s", line)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, drain, end the rest."""
        num_active = self._worker.num_active
        logger.info("stopping: %d sequences may run %g s more", num_active, self._drain_s)
        self._worker.drain()
        timer = asyncio.get_running_loop().call_later(self._drain_s, self._worker.abort_all)
        try:
            await super().shutdown(sockets=sockets)
        finally:
            timer.cancel()
        logger.info("stopped")


def _ready_lines(host: str, port: int, model_name: str, *, has_key: bool) -> list[str]:
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{port}"
    body = {"model": model_name, "prompt": "def is_even(n):\n    return n %", "max_tokens": 24}
    key = '-H "Authorization: Bearer $MODEL1_API_KEY" ' if has_key else ""
    json_type = '-H "Content-Type: application/json"'
    data = shlex.quote(orjson.dumps(body).decode())
    return [f"ready on {url}", f"try: curl {url}/v1/completions {key}{json_type} -d {data}"]
