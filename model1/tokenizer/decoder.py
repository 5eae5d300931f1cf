"""Bytes of tokens, and decoding one token at a time.

A byte-level vocabulary spells each byte as one printable character. A character of the text may
span tokens, so a stream must hold back bytes until the character is complete.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from functools import cache


@cache
def byte_alphabet() -> dict[str, int]:
    """Character -> byte of the byte-level alphabet that GPT-2's vocabulary introduced.

    Printable Latin-1 characters stand for themselves; the other 68 bytes, in order, are spelled
    with the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update((chr(0x100 + place), byte) for place, byte in enumerate(others))
    return alphabet


def spelled_bytes(token: str) -> bytes:
    """The bytes that a byte-level token spells. Raises KeyError on a foreign character."""
    alphabet = byte_alphabet()
    return bytes(alphabet[character] for character in token)


class IncrementalDecoder:
    """Decodes a stream of token ids; the pieces join to the decoding of all ids at once.

    `push` returns only complete characters and holds back at most three bytes, so its work does
    not grow with the stream. Bytes that are not UTF-8 become U+FFFD, as in a one-shot decode.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """bytes_of maps a token id to the bytes that it adds to the text."""
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        return self._utf8.decode(self._bytes_of(token_id))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else nothing."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
