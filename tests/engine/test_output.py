from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from model1.engine.output import OutputStream
from model1.engine.request import Request, RequestOutput, SamplingParams

from .fakes import END, EOS, PAD, FakeTokenizer
from .test_stop import oracle

ALPHABET = "aé€😀"
TEXT = st.text(alphabet=ALPHABET, max_size=24)


def feed(tokenizer: FakeTokenizer, params: SamplingParams, ids: list[int]) -> list[RequestOutput]:
    stream = OutputStream(Request("r", [3], params), tokenizer, max_model_len=1000)
    outputs = []
    for token_id in ids:
        outputs.append(stream.add(token_id, None))
        if outputs[-1].finished:
            break
    return outputs


def text_of(outputs: list[RequestOutput]) -> str:
    return "".join(output.text for output in outputs)


@settings(max_examples=150, deadline=None)
@given(
    text=TEXT,
    cuts=st.lists(st.integers(0, 60), max_size=20),
    stop=st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=3),
)
def test_streamed_text_is_the_full_text_up_to_the_first_stop_string(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    raw = text.encode()
    edges = [0, *sorted(c % (len(raw) + 1) for c in cuts), len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    ids = list(range(3, 3 + len(pieces)))
    params = SamplingParams(max_tokens=len(ids), stop=tuple(stop))
    outputs = feed(FakeTokenizer(pieces), params, ids)
    expected = oracle(text, stop)
    assert text_of(outputs) == (text if expected is None else expected)
    assert outputs[-1].finish_reason == ("length" if expected is None else "stop")
    assert not any(output.finished for output in outputs[:-1])
    assert all("\ufffd" not in output.text for output in outputs)


@given(raw=st.lists(st.binary(max_size=3), min_size=1, max_size=12))
def test_streamed_text_of_any_bytes_equals_decoding_them_at_once(raw: list[bytes]) -> None:
    tokenizer = FakeTokenizer(raw)
    ids = list(range(3, 3 + len(raw)))
    outputs = feed(tokenizer, SamplingParams(max_tokens=len(ids)), ids)
    assert text_of(outputs) == tokenizer.decode(ids)


def test_stop_tokens_end_the_text_and_stay_in_the_tokens() -> None:
    tokenizer = FakeTokenizer([b"a", b"b", b"\xc3"])
    outputs = feed(tokenizer, SamplingParams(max_tokens=9, stop_token_ids=(4,)), [3, 3, 4])
    assert (text_of(outputs), outputs[-1].finish_reason) == ("aa", "stop")
    assert outputs[-1].token_ids == (4,)
    for stop in (EOS, END):
        outputs = feed(tokenizer, SamplingParams(max_tokens=9), [3, 5, stop, 3])
        assert (text_of(outputs), len(outputs)) == ("a\ufffd", 3)
        assert outputs[-1].finish_reason == "stop"


def test_ignore_eos_goes_on_but_own_stop_tokens_still_end() -> None:
    tokenizer = FakeTokenizer([b"a", b"b"])
    params = SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(4,))
    outputs = feed(tokenizer, params, [3, EOS, END, 3, 4, 3])
    assert (text_of(outputs), len(outputs)) == ("aa", 5)


def test_text_held_for_a_stop_string_is_let_out_at_the_end() -> None:
    tokenizer = FakeTokenizer([b"ab", b"c"])
    params = SamplingParams(max_tokens=3, stop=("bcd",))
    outputs = feed(tokenizer, params, [3, 4, 3])
    assert [output.text for output in outputs] == ["a", "", "bcab"]
    outputs = feed(tokenizer, params, [3, EOS])
    assert [output.text for output in outputs] == ["a", "b"]


def test_stops_do_not_count_before_min_tokens() -> None:
    tokenizer = FakeTokenizer([b"a", b"b"])
    params = SamplingParams(max_tokens=9, min_tokens=2, stop=("b",), stop_token_ids=(3,))
    outputs = feed(tokenizer, params, [4, 4, 4])
    assert (text_of(outputs), len(outputs)) == ("bb", 3)
    assert len(feed(tokenizer, params, [3, 3, 3, 3])) == 3


def test_special_tokens_are_shown_on_request() -> None:
    tokenizer = FakeTokenizer([b"a", b"\xc3", b"\xa9"])
    ids = [3, PAD, 4, 5, 4, PAD]
    shown = SamplingParams(max_tokens=6, skip_special_tokens=False)
    assert text_of(feed(tokenizer, shown, ids)) == "a<pad>é\ufffd<pad>"
    hidden = SamplingParams(max_tokens=6)
    assert text_of(feed(tokenizer, hidden, ids)) == "aé\ufffd"
    assert text_of(feed(tokenizer, shown, [3, EOS])) == "a"


def test_length_is_reached_at_max_model_len() -> None:
    request = Request("r", [3] * 7, SamplingParams(max_tokens=100))
    stream = OutputStream(request, FakeTokenizer([b"a"]), max_model_len=10)
    reasons = [stream.add(3, None).finish_reason for _ in range(3)]
    assert reasons == [None, None, "length"]
