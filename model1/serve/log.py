"""Log records that are always one line of printable ASCII, whatever a client sent."""

from __future__ import annotations

import logging
import sys
import time

MAX_LINE_CHARS = 8192  # a traceback included


class OneLineFormatter(logging.Formatter):
    r"""time level logger: message, with control and non-ASCII characters as \n, \x1b, \u202e."""

    converter = time.gmtime
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """The record with its traceback, escaped and bounded."""
        return escape(super().format(record))[:MAX_LINE_CHARS]


def escape(text: str) -> str:
    """Printable ASCII stays, everything else becomes a backslash escape."""
    if text.isascii() and text.isprintable():
        return text
    return text.encode("unicode_escape").decode("ascii")


def configure(level: str) -> None:
    """Send every record of the process to stderr through the one-line formatter."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLineFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # uvicorn's own start and stop notes repeat ours.
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.root.level))
