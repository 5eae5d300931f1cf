"""What makes one file unfit as training text, and how much two files share.

The rules look at text only. They aim at what a model should not spend its bytes on: generated
tables, minified code, data in disguise, and the same code twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b

# a window is this many consecutive non-blank lines; one in `_WINDOW_SAMPLE` is remembered
_WINDOW_LINES = 5
_WINDOW_SAMPLE = 4
# fewer sampled windows than this say nothing about a file
_MIN_WINDOWS = 4
# generators announce themselves in a comment near the top
_HEADER_LINES = 12
_GENERATED = re.compile(
    r"(?im)^#.*(?:@generated|auto-?generated|generated (?:from|by|automatically|file)|do not edit)"
)
# A file may carry a stricter licence than its package's metadata says.
_COPYLEFT_LINES = 40
_COPYLEFT = re.compile(
    r"GNU (?:Lesser |Library |Affero )?General Public Licen[sc]e|\b[AL]?GPL-?v?[23]"
)
_CHOICE = re.compile(r"\b(?:MIT|BSD|Apache|dual)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusRules:
    """Limits for one file; see `refusal` for what each one refuses."""

    suffixes: frozenset[str] = frozenset({".py"})
    # copies of other projects, whose licence is not the one in the metadata
    skip_folders: frozenset[str] = frozenset(
        {"_vendor", "_vendored", "vendor", "vendored", "third_party", "_vendored_packages"}
        | {"node_modules", "site-packages", "__pycache__", ".git"}
    )
    min_file_bytes: int = 64
    max_file_bytes: int = 400_000
    max_mean_line_chars: float = 120.0
    max_repeated_line_share: float = 0.6
    max_digit_share: float = 0.25
    max_heldout_share: float = 0.15
    max_near_duplicate_share: float = 0.5


def refusal(text: str, rules: CorpusRules) -> str | None:
    """Why the text is unfit, as a short phrase for counting, or None if it is fit."""
    num_bytes = len(text.encode())
    if num_bytes < rules.min_file_bytes:
        return "too small"
    if num_bytes > rules.max_file_bytes:
        return "too large"
    if "\0" in text:
        return "holds NUL characters"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        return "blank"
    if _GENERATED.search("\n".join(lines[:_HEADER_LINES])):
        return "generated"
    notice = "\n".join(lines[:_COPYLEFT_LINES])
    if _COPYLEFT.search(notice) and not _CHOICE.search(notice):
        return "copyleft notice"
    if sum(map(len, lines)) > rules.max_mean_line_chars * len(lines):
        return "long lines"
    if len(lines) > 50 and len(set(lines)) < (1.0 - rules.max_repeated_line_share) * len(lines):
        return "repetitive"
    num_digits = sum(text.count(digit) for digit in "0123456789")
    if num_digits > rules.max_digit_share * sum(map(len, lines)):
        return "mostly digits"
    return None


class SeenWindows:
    """Remembers sampled windows of lines, to tell how much of a new text was there before.

    A window is five consecutive non-blank lines without their indentation; its 64-bit BLAKE2
    hash decides by itself whether it is sampled, so two texts sample the same windows.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, text: str) -> None:
        """Remembers the windows of `text`."""
        self._seen.update(_sampled_windows(text))

    def share(self, text: str) -> float:
        """Share of the sampled windows of `text` seen before, 0 for texts with too few."""
        windows = set(_sampled_windows(text))
        if len(windows) < _MIN_WINDOWS:
            return 0.0
        return len(windows & self._seen) / len(windows)


def _sampled_windows(text: str) -> Iterator[int]:
    lines = [s for s in (line.strip() for line in text.splitlines()) if s]
    for start in range(len(lines) - _WINDOW_LINES + 1):
        window = "\n".join(lines[start : start + _WINDOW_LINES])
        key = int.from_bytes(blake2b(window.encode(), digest_size=8).digest(), "big")
        if key % _WINDOW_SAMPLE == 0:
            yield key
