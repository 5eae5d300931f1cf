"""HTTP connections that must send their request head in time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class TimedProtocol(H11Protocol):
    """uvicorn's h11 protocol; a head not complete within header_timeout_s closes the connection.

    uvicorn itself only limits the pause between two requests, so that sockets which open and say
    nothing, or send a head byte by byte, would stay for ever.
    """

    header_timeout_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A head is due from now on."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """The data may complete a head or begin the next one."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Part of the next head may have come together with this request."""
        super().on_response_complete()
        if self.conn.trailing_data[0]:
            self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is due any more."""
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self) -> None:
        """Run one timer from the first byte of a head, or the connection, to its end."""
        if self._is_answering:
            self._stop_timer()
        elif self._head_timer is None and not self.transport.is_closing():
            self._head_timer = self.loop.call_later(self.header_timeout_s, self._close_late)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_late(self) -> None:
        self._head_timer = None
        if not self._is_answering and not self.transport.is_closing():
            self.transport.close()


def timed_protocol(header_timeout_s: float) -> type[TimedProtocol]:
    """TimedProtocol with another limit; uvicorn takes a class, not an instance."""
    return type("TimedProtocol", (TimedProtocol,), {"header_timeout_s": header_timeout_s})
