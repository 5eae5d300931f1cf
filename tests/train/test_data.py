from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from model1.errors import DataError
from model1.tokenizer import Tokenizer
from model1.train.data import Example, PackedRows, RowStream, open_cache, text_cache, write_cache

EOS = 0


@pytest.fixture
def rows(tokenizer: Tokenizer, tmp_path: Path) -> PackedRows:
    """Documents 10 11 .. of lengths 3, 9, 1, 5, 4 (end included); each token says who it is."""
    lengths = (3, 9, 1, 5, 4)
    examples = []
    for i, length in enumerate(lengths):
        ids = np.array([*(20 * (i + 1) + np.arange(length - 1)), EOS])
        examples.append((Example(ids, None), 7))
    write_cache(tmp_path / "c", examples, tokenizer)
    return PackedRows(open_cache(tmp_path / "c", tokenizer), seq_len=4, seed=3)


def stream(rows: PackedRows, epoch: int) -> list[int]:
    first = epoch * rows.rows_per_epoch
    return [int(t) for i in range(rows.rows_per_epoch) for t in rows.row(first + i)[0]]


def test_an_epoch_is_every_document_in_its_own_order(rows: PackedRows) -> None:
    assert rows.rows_per_epoch == 5  # 22 tokens
    first, second = stream(rows, 0), stream(rows, 1)
    everything = np.asarray(rows.cache.tokens).tolist()
    assert first != second
    for found in (first, second):
        missing = sorted(everything)
        for token in found:
            missing.remove(token)
        assert len(missing) == 22 - 20


def test_targets_are_the_next_token_within_the_document(rows: PackedRows) -> None:
    for index in range(2 * rows.rows_per_epoch):
        ids, targets, starts = rows.row(index)
        for column in range(rows.seq_len):
            if ids[column] == EOS:
                assert targets[column] == -100
            elif column + 1 < rows.seq_len:
                assert targets[column] == ids[column + 1]
        is_start = np.concatenate([[True], ids[:-1] == EOS])
        expected = np.maximum.accumulate(np.where(is_start, np.arange(rows.seq_len), 0))
        assert starts.tolist() == expected.tolist()


def test_a_row_depends_on_seed_and_number_alone(rows: PackedRows) -> None:
    late = [rows.row(i).tolist() for i in (7, 2, 7)]
    again = PackedRows(rows.cache, rows.seq_len, rows.seed)
    assert [again.row(i).tolist() for i in (7, 2, 7)] == late
    other = PackedRows(rows.cache, rows.seq_len, rows.seed + 1)
    assert [other.row(i).tolist() for i in range(5)] != [rows.row(i).tolist() for i in range(5)]


def test_a_loss_mask_hides_targets(tokenizer: Tokenizer, tmp_path: Path) -> None:
    example = Example(np.array([10, 11, 12, 13, EOS]), np.array([0, 0, 1, 1, 0]))
    write_cache(tmp_path / "c", [(example, 4)] * 2, tokenizer)
    cache = open_cache(tmp_path / "c", tokenizer)
    ids, targets, _ = PackedRows(cache, seq_len=9, seed=0).row(0)
    assert ids.tolist() == [10, 11, 12, 13, EOS, 10, 11, 12, 13]
    assert targets.tolist() == [-100, 12, 13, -100, -100, -100, 12, 13, -100]


def test_a_mix_takes_its_share_and_skips_nothing(rows: PackedRows) -> None:
    mixed = RowStream(rows, PackedRows(rows.cache, 4, seed=9), 0.25)
    extra = [i for i in range(20) if mixed.row(i).tolist() == mixed.extra.row(i // 4).tolist()]  # type: ignore[union-attr]
    assert {3, 7, 11, 15, 19} <= set(extra)
    main = [mixed.row(i).tolist() for i in range(20) if i % 4 != 3]
    assert main == [rows.row(i).tolist() for i in range(15)]


def test_a_batch_stacks_rows(rows: PackedRows) -> None:
    batch = RowStream(rows, None, 0.0).batch(2, 3)
    assert [t.shape for t in batch] == [(3, 4)] * 3
    assert all(t.dtype == torch.int64 for t in batch)
    assert batch.input_ids[1].tolist() == rows.row(3)[0].tolist()


def test_text_is_tokenised_once(text_dir: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    make = (str(text_dir),), tokenizer, str(tmp_path / "cache"), (".py",)
    cache = text_cache(*make)
    (folder,) = (tmp_path / "cache").iterdir()
    stamp = (folder / "tokens.bin").stat().st_mtime_ns
    again = text_cache(*make)
    assert (folder / "tokens.bin").stat().st_mtime_ns == stamp
    assert np.array_equal(cache.tokens, again.tokens)
    assert cache.tokens.dtype == np.uint16
    texts = [p.read_text(encoding="utf-8") for p in sorted(text_dir.rglob("*.py"))]
    assert cache.num_bytes == sum(len(t.encode()) for t in texts)
    ids = np.split(cache.tokens, cache.offsets[1:-1])
    assert [tokenizer.decode(d.tolist()) for d in ids] == texts
    assert all(d[-1] == tokenizer.eos_token_id for d in ids)


def test_a_failed_write_leaves_no_cache(
    text_dir: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.py").write_text("fine")
    (bad / "b.py").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"b\.py is not UTF-8"):
        text_cache((str(bad),), tokenizer, str(tmp_path / "cache"), (".py",))
    assert not (tmp_path / "cache").exists()


def test_sources_without_text_make_no_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.py").write_text("")
    with pytest.raises(DataError, match="hold no text"):
        text_cache((str(tmp_path / "empty"),), tokenizer, str(tmp_path / "cache"), (".py",))
    assert not (tmp_path / "cache").exists()


def test_too_little_text_is_an_error(rows: PackedRows) -> None:
    with pytest.raises(DataError, match="22 tokens, fewer than one row of 23"):
        PackedRows(rows.cache, seq_len=22, seed=0)
