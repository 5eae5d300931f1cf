"""HTTP connections that must send their request head in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from model1.serve.config import Limits


def timed_protocol(limits: Limits) -> type[asyncio.Protocol]:
    """uvicorn's h11 protocol; a head not complete within header_timeout_s closes the connection.

    uvicorn itself only limits the pause between two requests, so that sockets which open and say
    nothing, or send a head byte by byte, would stay for ever.
    """

    class TimedProtocol(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._watch_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def _watch_head(self) -> None:
            """A timer runs from the first byte (or the connection) to the complete head."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_timer()
            elif self._head_timer is None and not self.transport.is_closing():
                delay = limits.header_timeout_s
                self._head_timer = self.loop.call_later(delay, self._close_late)

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _close_late(self) -> None:
            self._head_timer = None
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if not is_answering and not self.transport.is_closing():
                self.transport.close()

    return TimedProtocol
