"""Text to token ids and back: encoding, incremental decoding, chat templates, vocabularies.

Text given by a user never becomes a special token; only the chat template and the caller's own
token ids can. Everything here works on host data and needs no torch.
"""

from model1.tokenizer.bpe import SPECIAL_TOKENS, train_tokenizer
from model1.tokenizer.core import Tokenizer
from model1.tokenizer.decoder import IncrementalDecoder
from model1.tokenizer.template import ChatTemplate

__all__ = ["SPECIAL_TOKENS", "ChatTemplate", "IncrementalDecoder", "Tokenizer", "train_tokenizer"]
