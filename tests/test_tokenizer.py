"""Encoding is lossless, streams equal one-shot decoding, and no text becomes a control token."""

from __future__ import annotations

import asyncio
import json
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model1.errors import TokenizerError
from model1.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from model1.tokenizer.compression import compression_table
from model1.tokenizer.decoder import byte_alphabet

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "checkpoints" / "code_small"
FOX = "The the THE \u0424\u0443\u043d\u043a\u0446\u0438\u044f \u6f22\u5b57 caf\u00e9 \U0001f600\n"


@cache
def small() -> Tokenizer:
    """A vocabulary small enough that most characters outside ASCII span several tokens."""
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "model1").glob("*.py"))]
    return train_tokenizer([*texts, FOX * 20], vocab_size=600)


TEXTS = st.text() | st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "<|", "|>", "\u6f22\u5b57", "\U0001f468\u200d\U0001f469", "\n"]
    )
).map("".join)
IDS = st.lists(st.integers(0, 599), max_size=60)


class TestEncode:
    @given(TEXTS)
    def test_text_survives_and_never_yields_special_ids(self, text: str):
        ids = small().encode(text)
        assert small().decode(ids) == text
        assert not set(ids) & set(small().special_tokens.values())

    @given(st.lists(TEXTS, max_size=5))
    def test_batch_equals_one_by_one(self, texts: list[str]):
        assert small().encode_batch(texts) == [small().encode(text) for text in texts]

    def test_lone_surrogate_is_refused(self):
        with pytest.raises(TokenizerError, match="not valid Unicode"):
            small().encode("a\ud800b")

    def test_other_types_are_refused(self):
        with pytest.raises(TokenizerError, match=r"texts\[1\] must be text, got bytes"):
            small().encode_batch(["a", b"b"])  # pyright: ignore[reportArgumentType]

    def test_split_rules_for_code(self):
        ids = small().encode("\n        return x_y[1234] + self.value(item)\n")
        pieces = [small().decode([i]) for i in ids]
        assert pieces[0] == "\n        "
        assert [p for p in pieces if p.strip().isdigit()] == ["1", "2", "3", "4"]
        # nothing joins a word to the dot or bracket before it
        assert not [p for p in pieces if p[:1] in ".([" and any(c.isalpha() for c in p)]


class TestDecode:
    @given(IDS)
    def test_agrees_with_the_library_on_any_ids(self, ids: list[int]):
        for skip in (True, False):
            expected = small()._backend.decode(ids, skip_special_tokens=skip)
            assert small().decode(ids, skip_special_tokens=skip) == expected

    def test_every_byte_has_a_token(self):
        by_byte = {small().token_bytes(i): i for i in range(small().vocab_size)}
        assert all(bytes([b]) in by_byte for b in range(256))
        assert sorted(byte_alphabet().values()) == list(range(256))

    @pytest.mark.parametrize("bad_id", [-1, 600, 10**9])
    def test_id_outside_vocabulary_is_refused(self, bad_id: int):
        with pytest.raises(TokenizerError, match=rf"\[0, 600\), got {bad_id}"):
            small().decode([5, bad_id])


class TestStream:
    @given(ids=IDS, skip=st.booleans())
    def test_pieces_join_to_one_shot_decode(self, ids: list[int], skip: bool):
        decoder = small().stream(skip_special_tokens=skip)
        pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
        assert "".join(pieces) == small().decode(ids, skip_special_tokens=skip)

    @given(st.binary(max_size=80))
    @example(b"\xf0\x80\xf0\x9f\x98")
    @example("\U0001f600\u6f22".encode() + b"\xe6\xbc")
    def test_arbitrary_bytes_one_token_each(self, data: bytes):
        by_byte = {small().token_bytes(i): i for i in range(small().vocab_size)}
        decoder = small().stream()
        text = "".join(decoder.push(by_byte[bytes([b])]) for b in data) + decoder.finish()
        assert text == data.decode("utf-8", errors="replace")

    @given(st.text(alphabet="\u6f22\u5b57\U0001f600\u00e9a \n\u0424", max_size=40))
    def test_valid_text_is_never_shown_with_replacement_characters(self, text: str):
        decoder = small().stream()
        shown = ""
        for token_id in small().encode(text):
            shown += decoder.push(token_id)
            assert text.startswith(shown)
        assert shown == text
        assert decoder.finish() == ""

    def test_work_for_each_token_does_not_grow_with_the_stream(self):
        read: list[int] = []

        def counted(token_id: int) -> bytes:
            read.append(token_id)
            return b"\x80"  # never part of a valid character

        decoder = small().stream()
        decoder._bytes_of = counted
        for place in range(2000):
            assert decoder.push(place) == "\ufffd"
            assert len(decoder._utf8.getstate()[0]) <= 3
        assert read == list(range(2000))

    def test_finish_resets(self):
        decoder = small().stream()
        first_byte = next(i for i in range(600) if small().token_bytes(i) == b"\xe6")
        assert decoder.push(first_byte) == ""
        assert [decoder.finish(), decoder.finish()] == ["\ufffd", ""]


class TestFiles:
    def test_save_and_load_are_inverse(self, tmp_path: Path):
        small().save(tmp_path)
        loaded = Tokenizer.from_dir(tmp_path)
        text = "def f():\n    return '<|end|>'\n"
        assert loaded.encode(text) == small().encode(text)
        assert loaded.special_tokens == small().special_tokens
        messages = [{"role": "user", "content": text}]
        assert loaded.apply_chat_template(messages) == small().apply_chat_template(messages)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", [None, b"", b"[]", b"{", b"\xff"])
    def test_missing_or_broken_file_is_named(
        self, tmp_path: Path, name: str, content: bytes | None
    ):
        small().save(tmp_path)
        (tmp_path / name).unlink()
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name):
            Tokenizer.from_dir(tmp_path)

    def test_missing_template_is_named(self, tmp_path: Path):
        small().save(tmp_path)
        (tmp_path / "chat_template.jinja").unlink()
        with pytest.raises(TokenizerError, match=r"chat_template\.jinja"):
            Tokenizer.from_dir(tmp_path)

    @pytest.mark.parametrize("value", [None, "<|nothing|>", 3])
    def test_special_token_must_exist(self, tmp_path: Path, value: Any):
        small().save(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": value}))
        with pytest.raises(TokenizerError, match="eos_token must name one of the special tokens"):
            Tokenizer.from_dir(tmp_path)

    def test_foreign_vocabulary_is_refused(self, tmp_path: Path):
        small().save(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": None}))
        with pytest.raises(TokenizerError, match="must be byte-level"):
            Tokenizer.from_dir(tmp_path)

    def test_vocab_size_needs_room_for_bytes(self):
        with pytest.raises(TokenizerError, match="at least 265, got 264"):
            train_tokenizer(["x"], vocab_size=264)

    def test_training_is_deterministic_and_complete(self):
        again = train_tokenizer([FOX * 20], vocab_size=300)
        assert (
            again._backend.to_str() == train_tokenizer([FOX * 20], vocab_size=300)._backend.to_str()
        )
        assert list(again.special_tokens) == list(SPECIAL_TOKENS)
        assert list(again.special_tokens.values()) == list(range(9))


class TestShipped:
    def test_size_and_special_ids(self):
        shipped = Tokenizer.from_dir(SHIPPED)
        assert shipped.vocab_size == 8192
        assert list(shipped.special_tokens.items()) == [
            (t, i) for i, t in enumerate(SPECIAL_TOKENS)
        ]
        assert (shipped.eos_token_id, shipped.pad_token_id, shipped.end_of_turn_token_id) == (
            0,
            1,
            5,
        )
        assert shipped.stop_token_ids == {0, 5}

    def test_python_source_takes_few_tokens(self):
        shipped = Tokenizer.from_dir(SHIPPED)
        # packages that the tokenizer was not trained on, on every machine
        files = [
            path for held_out in (asyncio, json) for path in Path(held_out.__path__[0]).glob("*.py")
        ]
        texts = [path.read_text(encoding="utf-8") for path in files]
        encoded = shipped.encode_batch(texts)
        assert [shipped.decode(ids) for ids in encoded] == texts
        num_bytes = sum(len(text.encode()) for text in texts)
        assert num_bytes / sum(map(len, encoded)) > 3.4

    def test_compressed_vocabulary_is_frozen(self):
        # the hash multipliers of trained Engram tables depend on this number
        assert int(Tokenizer.from_dir(SHIPPED).compression_table().max()) + 1 == 5540


def naive_compression(tokenizer: Tokenizer) -> list[int]:
    """The published rules spelled out with the standard library alone."""
    seen: dict[str, int] = {}
    table = []
    for token_id in range(tokenizer.vocab_size):
        raw = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in raw:
            key = str(tokenizer._backend.id_to_token(token_id))
        else:
            text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", raw))
            text = "".join(c for c in text if unicodedata.category(c) != "Mn").lower()
            for blank in "\t\r\n":
                text = text.replace(blank, " ")
            while "  " in text:
                text = text.replace("  ", " ")
            key = " " if text == " " else text.strip()
            key = key or raw
        table.append(seen.setdefault(key, len(seen)))
    return table


class TestCompressionTable:
    @pytest.mark.parametrize("source", ["small", "shipped"])
    def test_equals_the_rules_spelled_out(self, source: str):
        tokenizer = small() if source == "small" else Tokenizer.from_dir(SHIPPED)
        table = tokenizer.compression_table()
        assert table.dtype == np.int64
        assert table.shape == (tokenizer.vocab_size,)
        assert table.tolist() == naive_compression(tokenizer)
        # first-seen order: a new id is always the next free one
        assert (np.diff(np.maximum.accumulate(table)) <= 1).all()

    def test_forms_of_one_word_share_an_id_and_others_do_not(self):
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models

        space, newline = "\u0120", "\u010a"  # how the byte alphabet spells them
        latin_small_e_acute = "\u00c3\u00a9"  # the two bytes of U+00E9
        words = ["the", "The", space + "the", "THE", space, newline, space + space + newline]
        words += ["e", latin_small_e_acute, "\u00c3", "\u00a9", "they"]
        vocabulary = {word: place for place, word in enumerate(words)}
        backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
        backend.decoder = decoders.ByteLevel()
        assert compression_table(backend).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 4, 5]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1))
def test_chat_contents_hold_no_control_tokens(turns: list[tuple[str, str]]):
    tokenizer, special = small(), small().special_tokens
    expected: list[int] = []
    for role, content in turns:
        expected += [special[f"<|{role}|>"], *tokenizer.encode(content), special["<|end|>"]]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == expected
    assert tokenizer.apply_chat_template(messages) == [*expected, special["<|assistant|>"]]
