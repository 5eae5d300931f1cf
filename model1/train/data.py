"""Tokenised text on disk and the packed rows that training reads from it.

Each source is tokenised once into flat files (`tokens.bin`, `offsets.npy`, and for chat
`loss_mask.bin`) that are memory-mapped afterwards. A document is its tokens and one
<|endoftext|>. An epoch is all documents in a seeded order, cut into rows of seq_len; a document
that crosses a row border starts anew in the next row. A row is a pure function of (seed, row
number), so the position in the data is one integer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model1.errors import DataError
from model1.tokenizer import Tokenizer
from model1.train.documents import Document, read_documents, source_files

# Rises with the layout of the files and with the rules that make examples.
CACHE_VERSION = 1
# Text handed to the tokenizer at one time; it spreads a batch over all cores.
BATCH_CHARS = 8_000_000


class Batch(NamedTuple):
    """Rows of packed documents, all int64 [b, s]."""

    input_ids: Tensor
    targets: Tensor  # the next token, -100 where nothing is to be learned
    doc_starts: Tensor  # column at which the token's document begins in this row

    def to(self, device: torch.device) -> Batch:
        """The same rows on `device`; the copy to a GPU overlaps with earlier work."""
        if device.type == "cpu":
            return self
        return Batch(*(t.pin_memory().to(device, non_blocking=True) for t in self))


class Example(NamedTuple):
    """One tokenised document; `loss_mask` (uint8) is 1 where the token is a target."""

    token_ids: np.ndarray
    loss_mask: np.ndarray | None


@dataclass(frozen=True, slots=True)
class TokenCache:
    """Memory-mapped documents; document i is tokens[offsets[i]:offsets[i + 1]]."""

    tokens: np.ndarray  # uint16, or uint32 above 65,536 entries
    offsets: np.ndarray  # int64 [documents + 1]
    loss_mask: np.ndarray | None  # uint8, like tokens; None = every token is a target
    eos_token_id: int
    num_bytes: int  # UTF-8 bytes of the text

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for each token, document ends included."""
        return self.num_bytes / len(self.tokens)


def cache_key(tokenizer: Tokenizer, files: Iterable[Path], kind: str) -> str:
    """Hash of everything the cached tokens depend on: tokenizer, text, kind and layout."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {kind}".encode())
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        for path in sorted(Path(folder).iterdir()):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    for path in files:
        digest.update(path.as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def text_cache(
    sources: tuple[str, ...], tokenizer: Tokenizer, cache_dir: str, suffixes: tuple[str, ...]
) -> TokenCache:
    """The tokens of all documents of `sources`, read from the cache or made now."""
    files = [path for source in sources for path in source_files(source, suffixes)]
    folder = Path(cache_dir) / f"text-{cache_key(tokenizer, files, 'text')}"
    if not folder.is_dir():
        documents = read_documents(sources, suffixes)
        write_cache(folder, tokenise(documents, tokenizer), tokenizer)
    return open_cache(folder, tokenizer)


def tokenise(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[tuple[Example, int]]:
    """(Example, UTF-8 bytes) of each document, encoded in large batches."""
    texts: list[str] = []
    num_chars = 0
    for document in documents:
        texts.append(document.text)
        num_chars += len(document.text)
        if num_chars >= BATCH_CHARS:
            yield from _encode(texts, tokenizer)
            texts, num_chars = [], 0
    yield from _encode(texts, tokenizer)


def _encode(texts: list[str], tokenizer: Tokenizer) -> Iterator[tuple[Example, int]]:
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        tokens = np.array([*ids, tokenizer.eos_token_id])
        yield Example(tokens, None), len(text.encode("utf-8"))


def write_cache(
    folder: Path, examples: Iterable[tuple[Example, int]], tokenizer: Tokenizer
) -> None:
    """Write a cache folder; it appears under its name only when it is whole.

    Without an example it is a `DataError`, and no folder is made.
    """
    examples = iter(examples)
    first = next(examples, None)
    if first is None:
        raise DataError(f"the sources give no example for {folder.name}")
    temporary = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_files(temporary, itertools.chain([first], examples), tokenizer)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    temporary.rename(folder)


def _write_files(
    folder: Path, examples: Iterable[tuple[Example, int]], tokenizer: Tokenizer
) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    with open(folder / "tokens.bin", "wb") as tokens, open(folder / "loss_mask.bin", "wb") as masks:
        offsets, num_bytes = _append(examples, tokens, masks, dtype)
    if not (folder / "loss_mask.bin").stat().st_size:
        (folder / "loss_mask.bin").unlink()
    np.save(folder / "offsets.npy", np.array(offsets, np.int64))
    meta = {"dtype": dtype.name, "num_bytes": num_bytes}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _append(
    examples: Iterable[tuple[Example, int]], tokens: IO[bytes], masks: IO[bytes], dtype: np.dtype
) -> tuple[list[int], int]:
    offsets, num_bytes = [0], 0
    for example, size in examples:
        example.token_ids.astype(dtype).tofile(tokens)
        if example.loss_mask is not None:
            example.loss_mask.astype(np.uint8).tofile(masks)
        offsets.append(offsets[-1] + len(example.token_ids))
        num_bytes += size
    return offsets, num_bytes


def open_cache(folder: Path, tokenizer: Tokenizer) -> TokenCache:
    """Map a cache folder into memory."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    mask = folder / "loss_mask.bin"
    return TokenCache(
        tokens=np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), "r"),
        offsets=np.load(folder / "offsets.npy"),
        loss_mask=np.memmap(mask, np.uint8, "r") if mask.exists() else None,
        eos_token_id=tokenizer.eos_token_id,
        num_bytes=meta["num_bytes"],
    )


class PackedRows:
    """Rows of `seq_len` tokens, numbered without end; each epoch has its own order."""

    def __init__(self, cache: TokenCache, seq_len: int, seed: int) -> None:
        self.cache, self.seq_len, self.seed = cache, seq_len, seed
        # The last token of a row is predicted from the row, so one token more must exist.
        self.rows_per_epoch = (len(cache.tokens) - 1) // seq_len
        if self.rows_per_epoch < 1:
            raise DataError(
                f"the data holds {len(cache.tokens)} tokens, fewer than one row of {seq_len + 1}"
            )
        self._epoch = -1
        self._order = self._ends = np.zeros(0, np.int64)

    def row(self, index: int) -> np.ndarray:
        """Row number `index`: int64 [3, seq_len] of input ids, targets and document starts."""
        epoch, position = divmod(index, self.rows_per_epoch)
        self._enter(epoch)
        size = self.seq_len + 1
        ids = np.empty(size, np.int64)
        is_target = np.ones(size, bool)
        starts = np.empty(size, np.int64)
        column, place = 0, position * self.seq_len
        rank = int(np.searchsorted(self._ends, place, side="right"))
        while column < size:
            begin, end = self.cache.offsets[self._order[rank] : self._order[rank] + 2]
            begin = end - (self._ends[rank] - place)  # a continued document starts inside
            taken = int(min(end - begin, size - column))
            span, source = slice(column, column + taken), slice(begin, begin + taken)
            ids[span], starts[span] = self.cache.tokens[source], column
            if self.cache.loss_mask is not None:
                is_target[span] = self.cache.loss_mask[source]
            column, place, rank = column + taken, place + taken, rank + 1
        # What follows an end of document is another document: nothing to learn there.
        is_target[1:] &= ids[:-1] != self.cache.eos_token_id
        return np.stack((ids[:-1], np.where(is_target, ids, -100)[1:], starts[:-1]))

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            lengths = np.diff(self.cache.offsets)
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(lengths))
            self._ends = np.cumsum(lengths[self._order])
            self._epoch = epoch


class RowStream:
    """Rows of one source, or of two mixed evenly at a fixed share; numbered without end."""

    def __init__(self, main: PackedRows, extra: PackedRows | None, extra_share: float) -> None:
        self.main, self.extra, self.extra_share = main, extra, extra_share

    def row(self, index: int) -> np.ndarray:
        """Row `index` of the mix. int((index + 1) * share) rows before index + 1 are extra."""
        before, after = int(index * self.extra_share), int((index + 1) * self.extra_share)
        if self.extra is not None and after > before:
            return self.extra.row(before)
        return self.main.row(index - before)

    def batch(self, first_row: int, num_rows: int) -> Batch:
        """Rows first_row .. first_row + num_rows - 1 as int64 tensors on the CPU."""
        rows = np.stack([self.row(first_row + i) for i in range(num_rows)], axis=1)
        return Batch(*(torch.from_numpy(part) for part in rows))
