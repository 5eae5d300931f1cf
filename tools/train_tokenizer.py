"""Trains the shipped vocabulary on a corpus made by tools/build_corpus.py.

    python tools/train_tokenizer.py --corpus .data --out checkpoints/code_small

Takes a seeded random sample of whole training files, writes the tokenizer's three files, and
prints bytes per token on the held-out text and the size of Engram's compressed vocabulary.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from model1.tokenizer import Tokenizer, train_tokenizer
from model1.train.documents import read_documents


def sample_texts(path: Path, *, num_chars: int, seed: int) -> list[str]:
    """Whole documents in a seeded random order until num_chars characters are reached."""
    texts = [document.text for document in read_documents([path])]
    random.Random(seed).shuffle(texts)
    taken: list[str] = []
    for text in texts:
        if num_chars <= 0:
            break
        taken.append(text)
        num_chars -= len(text)
    return taken


def report(tokenizer: Tokenizer, heldout: Path) -> str:
    """Bytes per token for each held-out package and in total, as lines of text."""
    counts: dict[str, list[int]] = {}
    for document in read_documents([heldout]):
        ids = tokenizer.encode(document.text)
        if tokenizer.decode(ids) != document.text:
            raise AssertionError(f"{document.path} does not survive encoding")
        for name in (document.package, "total"):
            row = counts.setdefault(name, [0, 0])
            row[0] += len(document.text.encode())
            row[1] += len(ids)
    return "\n".join(f"{name:20} {b / t:.3f} bytes/token" for name, (b, t) in counts.items())


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--sample-chars", type=int, default=50_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    texts = sample_texts(
        args.corpus / "train.jsonl.xz", num_chars=args.sample_chars, seed=args.seed
    )
    tokenizer = train_tokenizer(texts, vocab_size=args.vocab_size)
    tokenizer.save(args.out)
    print(report(tokenizer, args.corpus / "heldout.jsonl.xz"))
    compressed = int(tokenizer.compression_table().max()) + 1
    print(f"vocabulary {tokenizer.vocab_size}, compressed {compressed}")


if __name__ == "__main__":
    main()
