"""What one engine step tells the model about its tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """t tokens of b requests, each request's tokens contiguous and in order; filled by the engine.

    A pure function of the requests' token histories and block tables: any split of a prefill into
    chunks gives every token the same row of `ngram_token_ids` and the same visible keys.
    """

    token_ids: Tensor  # [t] int64
    positions: Tensor  # [t] int64, 0-based position in the request
    ngram_token_ids: Tensor  # [t, N] int64, column i = i tokens earlier, -1 before the start
    slot_mapping: Tensor  # [t] int64, where each token's key/value is written
    block_table: Tensor  # [b, max_blocks] int32, -1 = none
    query_lens: tuple[int, ...]  # tokens of each request in this step, each >= 1
    cache_seqlens: tuple[int, ...]  # valid tokens per request after this step's write
    logits_rows: Tensor  # [n] int64, rows for which logits are wanted
