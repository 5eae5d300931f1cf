"""The vocabulary seen by Engram's hash: token ids whose text differs only in form share an id.

Every hash multiplier depends on the number of compressed ids, so the rules below are a contract
with trained tables: NFKC, NFD, accents off, lower case, runs of blanks to one space, strip.
Source: Engram, arXiv 2601.07372, tokenizer compression.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from tokenizers.normalizers import Normalizer

_REPLACEMENT = "\ufffd"  # decoding part of a character gives this
_KEPT_SPACE = "\ue000"  # private-use stand-in that keeps a lone space from being stripped


def compression_table(backend: Backend) -> np.ndarray:
    """Compressed id of each token id, int64 [vocab_size]; ids are given in first-seen order.

    The key of a token is its normalised text; its own spelling if the text is part of a
    character; its text as it is if normalisation leaves nothing.
    """
    vocab_size = backend.get_vocab_size(with_added_tokens=True)
    texts = backend.decode_batch([[i] for i in range(vocab_size)], skip_special_tokens=False)
    normalizer = _normalizer()
    compressed_ids: dict[str, int] = {}
    table = np.empty(vocab_size, dtype=np.int64)
    for token_id, text in enumerate(texts):
        if _REPLACEMENT in text:
            key = backend.id_to_token(token_id) or text
        else:
            key = normalizer.normalize_str(text) or text
        table[token_id] = compressed_ids.setdefault(key, len(compressed_ids))
    return table


def _normalizer() -> Normalizer:
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"\A \z"), _KEPT_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_KEPT_SPACE, " "),
        ]
    )
