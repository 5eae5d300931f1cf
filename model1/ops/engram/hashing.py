"""The constants behind the Engram hash: multipliers, prime table sizes and row offsets.

They are a compatibility contract: the same configuration gives the same rows in every
implementation, so a trained table can be moved. Everything here is exact integer arithmetic on
the host and runs once per model; the hash of tokens itself is `model1.ops.engram.engram_hash`.
Source: arXiv 2601.07372, and the tables of the released checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from model1.config import EngramConfig
from model1.errors import ConfigError

_INT64_MAX = 2**63 - 1
_LAYER_SEED_STRIDE = 10007  # separates the random streams of the layers; part of the contract
# Deterministic for every n below 3.3e24 (Sorenson and Webster, arXiv 1509.00864).
_MILLER_RABIN_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True, eq=False, slots=True)
class HashSpec:
    """Hash constants of one layer; T = (N - 1) * K tables, order-major then head.

    multipliers    [N] int64, odd; one per place, the current token first
    table_sizes    [T] int64, distinct primes
    table_offsets  [T] int64, first row of each table in the layer's one flat table
    """

    multipliers: np.ndarray
    table_sizes: np.ndarray
    table_offsets: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows of the layer's flat table."""
        return int(self.table_sizes.sum())


def build_hash_specs(config: EngramConfig) -> dict[int, HashSpec]:
    """Hash constants of every Engram layer, keyed by global layer id.

    The table sizes of all layers are distinct: for each layer in the listed order, then each
    n-gram order, then each head, the smallest prime >= engram_vocab_size not taken before.
    Raises ConfigError for a negative seed or when a layer's rows pass int64.
    """
    if config.engram_seed < 0:
        raise ConfigError(f"engram_seed must not be negative, got {config.engram_seed}")
    used: set[int] = set()
    specs: dict[int, HashSpec] = {}
    for layer_idx in config.engram_layer_ids:
        sizes = [
            prime
            for _ in range(config.engram_max_ngram_size - 1)
            for prime in _take_primes(config.engram_vocab_size, config.engram_n_heads, used)
        ]
        if sum(sizes) > _INT64_MAX:
            raise ConfigError(
                f"engram_vocab_size must keep a layer's rows below 2^63, "
                f"got {config.engram_vocab_size} for {len(sizes)} tables"
            )
        table_sizes = np.array(sizes, dtype=np.int64)
        specs[layer_idx] = HashSpec(
            multipliers=_multipliers(config, layer_idx),
            table_sizes=table_sizes,
            table_offsets=np.cumsum(table_sizes) - table_sizes,
        )
    return specs


def check_compression_table(compression_table: np.ndarray, config: EngramConfig) -> None:
    """Raise ConfigError unless the tokenizer's table is the one the hash was built for.

    compression_table: [vocab] integers, onto 0..engram_compressed_vocab_size - 1. Every
    multiplier depends on that number, so another table would silently read other rows.
    """
    size = config.engram_compressed_vocab_size
    seen = np.unique(compression_table)
    if compression_table.ndim != 1 or not np.array_equal(seen, np.arange(size)):
        found = f"{seen.size} ids in [{seen.min()}, {seen.max()}]" if seen.size else "no ids"
        raise ConfigError(
            f"engram_compressed_vocab_size is {size}, so the compression table must be one row "
            f"that uses every id in [0, {size}); got shape {compression_table.shape} with {found}"
        )
    if config.engram_pad_token_id >= compression_table.size:
        raise ConfigError(
            f"engram_pad_token_id must be below the vocabulary size {compression_table.size}, "
            f"got {config.engram_pad_token_id}"
        )


def _multipliers(config: EngramConfig, layer_idx: int) -> np.ndarray:
    # An odd multiplier is at most (2^63 - 1) // V', and a compressed id is below V', so no
    # product passes int64 and the modulo never meets a negative number.
    bound = max(1, (_INT64_MAX // config.engram_compressed_vocab_size) // 2)
    generator = np.random.default_rng(config.engram_seed + _LAYER_SEED_STRIDE * layer_idx)
    draws = generator.integers(0, bound, size=config.engram_max_ngram_size, dtype=np.int64)
    return 2 * draws + 1


def _take_primes(first: int, count: int, used: set[int]) -> list[int]:
    """The `count` smallest primes >= first that are not in `used`; adds them to it."""
    primes: list[int] = []
    candidate = first
    while len(primes) < count:
        if candidate not in used and _is_prime(candidate):
            primes.append(candidate)
            used.add(candidate)
        candidate += 1
    return primes


def _is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin test."""
    if n < 2:
        return False
    for prime in _MILLER_RABIN_BASES:
        if n % prime == 0:
            return n == prime
    odd = n - 1
    twos = (odd & -odd).bit_length() - 1
    odd >>= twos
    return all(_passes(n, base, odd, twos) for base in _MILLER_RABIN_BASES)


def _passes(n: int, base: int, odd: int, twos: int) -> bool:
    x = pow(base, odd, n)
    if x in (1, n - 1):
        return True
    for _ in range(twos - 1):
        x = x * x % n
        if x == n - 1:
            return True
    return False
