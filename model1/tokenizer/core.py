"""The tokenizer of a checkpoint: text to ids, ids to text, chat to ids.

Wraps the `tokenizers` library for byte-level BPE. Special tokens come only from ids and from the
chat template: text that looks like one is encoded as ordinary characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model1.errors import TokenizerError
from model1.tokenizer.compression import compression_table
from model1.tokenizer.decoder import IncrementalDecoder, spelled_bytes
from model1.tokenizer.template import ChatTemplate

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer as Backend

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"


class Tokenizer:
    """A byte-level BPE vocabulary with its special tokens and chat template.

    `special_tokens` maps the text of each special token to its id; `stop_token_ids` holds the
    two that end an answer.
    """

    def __init__(self, backend: Backend, config: dict[str, Any], chat_template: str) -> None:
        """config holds the keys of tokenizer_config.json; eos_token, pad_token and
        end_of_turn_token are required and name special tokens. TokenizerError otherwise.
        """
        self._backend = backend
        # without this, the text "<|end|>" in a message would become the control token
        backend.encode_special_tokens = True
        self._config = dict(config)
        self._template = ChatTemplate(chat_template)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.special_tokens = {t.content: i for i, t in sorted(added.items()) if t.special}
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self.end_of_turn_token_id = self._special_id("end_of_turn_token")
        self.stop_token_ids = frozenset({self.eos_token_id, self.end_of_turn_token_id})
        self._token_bytes = _vocabulary_bytes(backend, self.special_tokens)
        self._special_text = {i: text.encode() for text, i in self.special_tokens.items()}

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja from a folder.

        Raises TokenizerError naming the file if one is missing or invalid.
        """
        from tokenizers import Tokenizer as Backend

        folder = Path(path)
        config_text = _read(folder / CONFIG_FILE)
        chat_template = _read(folder / TEMPLATE_FILE)
        vocabulary = _read(folder / TOKENIZER_FILE)
        try:
            config = json.loads(config_text)
        except ValueError as error:
            raise TokenizerError(f"{folder / CONFIG_FILE} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise TokenizerError(f"{folder / CONFIG_FILE} must hold a JSON object")
        try:
            backend = Backend.from_str(vocabulary)
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{folder / TOKENIZER_FILE} is invalid: {error}") from error
        return cls(backend, config, chat_template)

    def save(self, path: str | Path) -> None:
        """Writes the three files that `from_dir` reads; the folder is created if needed."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / TOKENIZER_FILE).write_text(self._backend.to_str(), encoding="utf-8")
        config = json.dumps(self._config, indent=2) + "\n"
        (folder / CONFIG_FILE).write_text(config, encoding="utf-8")
        (folder / TEMPLATE_FILE).write_text(self._template.source, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. None of them is special, whatever the text says."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode`. Releases the interpreter lock meanwhile.

        Raises TokenizerError if a text is no `str` or holds a lone surrogate, which UTF-8 lacks.
        """
        try:
            # encode() keeps the lock: other threads would stall for seconds on a long prompt
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(_not_text(texts) or str(error)) from error
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD.

        Special tokens give nothing, or their own text if skip_special_tokens is false. Raises
        TokenizerError on an id outside the vocabulary.
        """
        bytes_of = self.token_bytes if skip_special_tokens else self._all_bytes
        return b"".join(map(bytes_of, ids)).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, b"" for a special token.

        Raises TokenizerError on an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocab_size:
            raise TokenizerError(f"token id must be in [0, {self.vocab_size}), got {token_id}")
        return self._token_bytes[token_id]

    def stream(self, *, skip_special_tokens: bool = True) -> IncrementalDecoder:
        """A decoder for one stream of ids; its pieces join to `decode` of all of them."""
        return IncrementalDecoder(self.token_bytes if skip_special_tokens else self._all_bytes)

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation of {"role", "content"} messages.

        Each content is encoded on its own and holds no special token. Raises TokenizerError on
        a malformed message or a template that breaks the rules of `model1.tokenizer.sandbox`.
        """
        pieces = self._template.render(messages, add_generation_prompt=add_generation_prompt)
        ids: list[int] = []
        for text, trusted in pieces:
            ids.extend(self._encode_trusted(text) if trusted else self.encode(text))
        return ids

    def compression_table(self) -> np.ndarray:
        """Engram's compressed id of each token id, int64 [vocab_size]; see compression.py."""
        return compression_table(self._backend)

    def _encode_trusted(self, text: str) -> list[int]:
        ids: list[int] = []
        names = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        for part in re.split(f"({names})", text):
            special = self.special_tokens.get(part)
            ids.extend(self.encode(part) if special is None else [special])
        return ids

    def _all_bytes(self, token_id: int) -> bytes:
        special = self._special_text.get(token_id)
        return self.token_bytes(token_id) if special is None else special

    def _special_id(self, key: str) -> int:
        name = self._config.get(key)
        if not isinstance(name, str) or name not in self.special_tokens:
            raise TokenizerError(
                f"{key} must name one of the special tokens {list(self.special_tokens)}, "
                f"got {name!r}"
            )
        return self.special_tokens[name]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"tokenizer file {path} cannot be read: {error}") from error


def _not_text(texts: Sequence[object]) -> str | None:
    """What keeps one of the texts from being encoded; the library's own message is vague."""
    for place, text in enumerate(texts):
        if not isinstance(text, str):
            return f"texts[{place}] must be text, got {type(text).__name__}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return f"texts[{place}] is not valid Unicode: {error.reason} at {error.start}"
    return None


def _vocabulary_bytes(backend: Backend, special_tokens: dict[str, int]) -> list[bytes]:
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None or decoder.get("type") != "ByteLevel":
        raise TokenizerError(f"the vocabulary must be byte-level, its decoder is {decoder}")
    table: list[bytes] = []
    for token_id in range(backend.get_vocab_size(with_added_tokens=True)):
        token = backend.id_to_token(token_id)
        if token is None:
            raise TokenizerError(f"the vocabulary has no token for id {token_id}")
        try:
            table.append(b"" if token in special_tokens else spelled_bytes(token))
        except KeyError as error:
            raise TokenizerError(f"token {token_id} {token!r} is not byte-level") from error
    return table
