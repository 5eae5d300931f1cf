"""Stop strings in streamed text: nothing of a stop string is ever let out.

Which occurrence ends the text does not depend on how the text is cut into pieces: the one that is
complete first, and of those the one that starts first.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopBuffer:
    """Passes text on, holding back only what could still become a stop string."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """Add text; return what can be let out now and whether a stop string was met.

        With `may_stop` false, stop strings completed by this text do not count. After a stop the
        rest is dropped and the buffer must not be used again.
        """
        if not self._stop:
            return text, False
        num_searched = len(self._held)
        buffer = self._held + text
        start = self._find(buffer, num_searched) if may_stop else None
        if start is not None:
            self._held = ""
            return buffer[:start], True
        cut = len(buffer) - self._num_held(buffer)
        self._held = buffer[cut:]
        return buffer[:cut], False

    def flush(self) -> str:
        """The text held back, once no more can come."""
        held, self._held = self._held, ""
        return held

    def _find(self, buffer: str, num_searched: int) -> int | None:
        """Start of the match with the smallest end > num_searched, then the smallest start."""
        best: tuple[int, int] | None = None  # end, start
        for stop in self._stop:
            start = buffer.find(stop, max(num_searched + 1 - len(stop), 0))
            if start >= 0:
                found = (start + len(stop), start)
                best = found if best is None else min(best, found)
        return None if best is None else best[1]

    def _num_held(self, buffer: str) -> int:
        """Length of the longest end of `buffer` that is a proper beginning of a stop string."""
        longest = min(len(buffer), max(len(stop) for stop in self._stop) - 1)
        for length in range(longest, 0, -1):
            tail = buffer[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0
