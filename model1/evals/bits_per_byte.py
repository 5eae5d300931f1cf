"""Bits per byte of a model on held-out documents, beside gzip and xz on the same text.

bits per byte = total nats / ln 2 / total UTF-8 bytes

The nats code everything a decoder would need: each token given those before it in the document,
the end of the document, and the first token at ln(vocab_size). Documents longer than the
context are cut into windows; every token is scored exactly once.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from model1.errors import DataError
from model1.tokenizer import Tokenizer
from model1.train.corpus import Document
from model1.train.loss import IGNORE, Trainable

CHUNK_TOKENS = 8192  # tokens whose logits exist at one time


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSettings:
    """How documents are cut and scored. stride < seq_len gives each window earlier context."""

    seq_len: int
    stride: int
    batch_rows: int = 8
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise DataError(f"seq_len must be at least 2, got {self.seq_len}")
        if not 1 <= self.stride <= self.seq_len:
            raise DataError(f"stride must be in [1, seq_len {self.seq_len}], got {self.stride}")
        if self.precision not in ("fp32", "bf16"):
            raise DataError(f"precision must be 'fp32' or 'bf16', got {self.precision!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What one package, or everything, costs to store."""

    name: str
    num_documents: int
    num_bytes: int
    num_tokens: int
    model_nats: float
    gzip_bytes: int  # one stream of all documents
    xz_bytes: int
    gzip_files_bytes: int  # each document on its own
    xz_files_bytes: int

    @property
    def model(self) -> float:
        """Bits per byte of the model."""
        return self.model_nats / math.log(2) / self.num_bytes

    def bits(self, compressed_bytes: int) -> float:
        """Bits per byte of a compressor's output."""
        return 8.0 * compressed_bytes / self.num_bytes

    def to_dict(self) -> dict[str, Any]:
        """Counts and the bits per byte of each method."""
        methods = ("gzip", "xz", "gzip_files", "xz_files")
        bits = {name: self.bits(getattr(self, f"{name}_bytes")) for name in methods}
        return {**asdict(self), "bits_per_byte": {"model": self.model, **bits}}


class Window(NamedTuple):
    """A part of one document: tokens[begin:begin + length] in, the next of each out."""

    document: int
    tokens: np.ndarray  # int64 [length + 1]
    num_context: int  # leading targets that an earlier window has scored


def subset(documents: Iterable[Document], max_bytes: int | None) -> list[Document]:
    """Whole documents of at most `max_bytes` together, chosen by a hash of their names.

    None keeps everything. The result is in (package, path) order. Errors: `DataError` if none
    fits.
    """
    everything = sorted(documents, key=lambda d: (d.package, d.path))
    if max_bytes is None:
        return everything
    chosen, room = [], max_bytes
    for document in sorted(everything, key=_rank):
        size = len(document.text.encode("utf-8"))
        if size <= room:
            chosen.append(document)
            room -= size
    if not chosen:
        raise DataError(f"no document fits into max_bytes {max_bytes}")
    return sorted(chosen, key=lambda d: (d.package, d.path))


def _rank(document: Document) -> bytes:
    return hashlib.sha256(f"{document.package}/{document.path}".encode()).digest()


def bits_per_byte(
    model: Trainable,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    settings: EvalSettings,
    *,
    device: torch.device,
) -> list[Score]:
    """Scores of each package in order, then of all documents under the name "total"."""
    if not documents:
        raise DataError("no documents to evaluate")
    encoded = tokenizer.encode_batch([document.text for document in documents])
    tokens = [np.array([*ids, tokenizer.eos_token_id], np.int64) for ids in encoded]
    nats = document_nats(model, tokens, settings, device=device)
    nats += math.log(tokenizer.vocab_size)  # the first token of each document
    packages = np.array([document.package for document in documents])
    scores = []
    for name in dict.fromkeys(packages.tolist()):
        members = np.flatnonzero(packages == name).tolist()
        texts = [documents[i].text.encode("utf-8") for i in members]
        num_tokens = sum(len(tokens[i]) for i in members)
        scores.append(_score(name, texts, num_tokens, float(nats[members].sum())))
    return [*scores, _total(scores, [document.text.encode("utf-8") for document in documents])]


def _score(name: str, texts: list[bytes], num_tokens: int, nats: float) -> Score:
    whole = b"".join(texts)
    return Score(
        name=name,
        num_documents=len(texts),
        num_bytes=len(whole),
        num_tokens=num_tokens,
        model_nats=nats,
        gzip_bytes=gzip_size(whole),
        xz_bytes=xz_size(whole),
        gzip_files_bytes=sum(map(gzip_size, texts)),
        xz_files_bytes=sum(map(xz_size, texts)),
    )


def _total(scores: list[Score], texts: list[bytes]) -> Score:
    whole = b"".join(texts)
    return Score(
        name="total",
        num_documents=sum(s.num_documents for s in scores),
        num_bytes=sum(s.num_bytes for s in scores),
        num_tokens=sum(s.num_tokens for s in scores),
        model_nats=sum(s.model_nats for s in scores),
        gzip_bytes=gzip_size(whole),
        xz_bytes=xz_size(whole),
        gzip_files_bytes=sum(s.gzip_files_bytes for s in scores),
        xz_files_bytes=sum(s.xz_files_bytes for s in scores),
    )


def gzip_size(data: bytes) -> int:
    """Bytes of `gzip -9`."""
    return len(gzip.compress(data, 9, mtime=0))


def xz_size(data: bytes) -> int:
    """Bytes of `xz -9e`."""
    # A dictionary larger than the data changes nothing but the memory that the encoder clears.
    size = max(4096, min(1 << 26, len(data)))
    filters = [
        {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size},
    ]
    return len(lzma.compress(data, check=lzma.CHECK_CRC64, filters=filters))


@torch.no_grad()
def document_nats(
    model: Trainable,
    documents: Sequence[np.ndarray],
    settings: EvalSettings,
    *,
    device: torch.device,
) -> np.ndarray:
    """Nats of every token but the first, summed for each document: float64 [documents].

    documents: int64 token ids, each at least one long. Windows share rows as separate documents.
    """
    windows = [w for i, tokens in enumerate(documents) for w in _windows(i, tokens, settings)]
    rows = _pack(windows, settings.seq_len)
    nats = np.zeros(len(documents))
    for first in range(0, len(rows), settings.batch_rows):
        batch = rows[first : first + settings.batch_rows]
        arrays = np.stack([_fill(row, settings.seq_len) for row in batch], axis=1)
        ids, targets, starts, owners = (torch.from_numpy(a) for a in arrays)
        losses = _token_losses(model, ids, targets, starts, settings.precision, device)
        is_target = (targets != IGNORE).numpy()
        owned = owners.numpy()[is_target]
        nats += np.bincount(owned, losses.numpy()[is_target], minlength=len(documents))
    return nats


def _windows(document: int, tokens: np.ndarray, settings: EvalSettings) -> Iterator[Window]:
    scored = 0  # targets of earlier windows
    begin = 0
    while scored < len(tokens) - 1:
        part = tokens[begin : begin + settings.seq_len + 1]
        yield Window(document, part, scored - begin)
        scored = begin + len(part) - 1
        begin += settings.stride


def _pack(windows: Sequence[Window], seq_len: int) -> list[list[Window]]:
    """First fit, longest first, among the rows opened last."""
    rows: list[list[Window]] = []
    room: list[int] = []
    for window in sorted(windows, key=lambda w: -len(w.tokens)):
        length = len(window.tokens) - 1
        recent = range(max(0, len(rows) - 64), len(rows))
        place = next((i for i in recent if room[i] >= length), None)
        if place is None:
            rows.append([])
            room.append(seq_len)
            place = len(rows) - 1
        rows[place].append(window)
        room[place] -= length
    return rows


def _fill(row: Sequence[Window], seq_len: int) -> np.ndarray:
    """int64 [4, seq_len]: ids, targets, document starts, owning document."""
    filled = np.zeros((4, seq_len), np.int64)
    filled[1] = IGNORE
    column = 0
    for window in row:
        span = slice(column, column + len(window.tokens) - 1)
        filled[0, span], filled[1, span] = window.tokens[:-1], window.tokens[1:]
        filled[1, column : column + window.num_context] = IGNORE
        filled[2, span], filled[3, span] = column, window.document
        column = span.stop
    filled[2, column:] = min(column, seq_len - 1)  # the unused end is a document of its own
    return filled


def _token_losses(
    model: Trainable,
    ids: torch.Tensor,
    targets: torch.Tensor,
    starts: torch.Tensor,
    precision: str,
    device: torch.device,
) -> torch.Tensor:
    """Cross-entropy of each target, float64 [b, s] on the CPU; 0 where there is none."""
    enabled = precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled):
        hidden, _ = model.forward_hidden(ids.to(device), doc_starts=starts.to(device))
        flat, wanted = hidden.flatten(0, 1), targets.flatten().to(device)
        weight = model.output_weight.to(hidden.dtype)
        losses = [
            F.cross_entropy((h @ weight.T).float(), t, ignore_index=IGNORE, reduction="none")
            for h, t in zip(flat.split(CHUNK_TOKENS), wanted.split(CHUNK_TOKENS), strict=True)
        ]
    return torch.cat(losses).double().cpu().view(targets.shape)
