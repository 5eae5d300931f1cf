from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from model1.engine.stop import StopBuffer

texts = st.text(alphabet="abc", max_size=40)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=6), max_size=4)


def cut(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def oracle(text: str, stop: list[str], first_end: int = 1) -> str | None:
    """The text before the stop string that is complete first; None if there is none."""
    for end in range(first_end, len(text) + 1):
        starts = [end - len(s) for s in stop if text[:end].endswith(s)]
        if starts:
            return text[: min(starts)]
    return None


@given(text=texts, cuts=st.lists(st.integers(0, 40), max_size=12), stop=stops)
def test_any_cutting_gives_the_text_before_the_first_stop_string(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    buffer = StopBuffer(stop)
    out, stopped = "", False
    for piece in cut(text, cuts):
        new, stopped = buffer.push(piece)
        out += new
        if stopped:
            break
    if not stopped:
        out += buffer.flush()
    expected = oracle(text, stop)
    assert (out, stopped) == (text if expected is None else expected, expected is not None)


@given(text=texts, cuts=st.lists(st.integers(0, 40), max_size=12), stop=stops)
def test_text_is_held_only_while_it_could_become_a_stop_string(
    text: str, cuts: list[int], stop: list[str]
) -> None:
    buffer = StopBuffer(stop)
    read = out = ""
    for piece in cut(text, cuts):
        new, stopped = buffer.push(piece)
        read, out = read + piece, out + new
        if stopped:
            return
        held = read[len(out) :]
        beginnings = [s[:n] for s in stop for n in range(1, len(s))]
        assert held == max((b for b in beginnings if read.endswith(b)), key=len, default="")


@given(
    text=texts, cuts=st.lists(st.integers(0, 40), max_size=12), stop=stops, free=st.integers(0, 12)
)
def test_a_stop_string_complete_before_it_may_stop_does_not_count(
    text: str, cuts: list[int], stop: list[str], free: int
) -> None:
    buffer = StopBuffer(stop)
    pieces = cut(text, cuts)
    out, stopped = "", False
    for i, piece in enumerate(pieces):
        new, stopped = buffer.push(piece, may_stop=i >= free)
        out += new
        if stopped:
            break
    if not stopped:
        out += buffer.flush()
    expected = oracle(text, stop, len("".join(pieces[:free])) + 1)
    assert (out, stopped) == (text if expected is None else expected, expected is not None)
