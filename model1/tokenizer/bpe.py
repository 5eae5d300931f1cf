"""Trains a byte-level BPE vocabulary for source code.

Splitting before the merges: line ends take the indentation that follows them, a word may take
one space and one underscore before it, digits stand alone, and punctuation never joins a word,
so that a completion after `.` or `(` starts at a token boundary.
"""

from __future__ import annotations

from collections.abc import Iterable

from model1.errors import TokenizerError
from model1.tokenizer.core import Tokenizer

# ids 0, 1, 2, ... in this order; the first ends a document
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|assistant|>' }}
{%- endif -%}
"""

_SPLIT_PATTERN = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line ends with the next line's indentation
        r" ?__[a-z]+__",  # __init__
        r" ?_?[\p{L}\p{M}]+",  # a word; snake_case splits before each underscore
        r" ?\p{N}",  # one digit
        r" ?_+",
        r" ?[^\s\p{L}\p{M}\p{N}_]+",  # punctuation
        r"\s+(?!\S)",  # spaces, all but the one that belongs to the next word
        r"\s+",
    )
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer with `vocab_size` entries at most: special tokens, 256 bytes, merges.

    Fewer merges are made only if the text has no more pairs. Lossless on any text. Raises
    TokenizerError if vocab_size leaves no room for the special tokens and the bytes.
    """
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise TokenizerError(f"vocab_size must be at least {smallest}, got {vocab_size}")
    backend = Backend(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(
        backend,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|pad|>",
            "end_of_turn_token": "<|end|>",
        },
        CHAT_TEMPLATE,
    )
