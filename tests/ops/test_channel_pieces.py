"""Pieces of channels: every channel once, every width a power of two."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model1.ops.channel_pieces import channel_pieces


@given(
    start=st.integers(0, 600),
    count=st.integers(0, 600),
    narrowest=st.sampled_from([16, 64]),
    doublings=st.integers(0, 4),
)
def test_pieces_cover_every_channel_once(
    start: int, count: int, narrowest: int, doublings: int
) -> None:
    widest, end = narrowest << doublings, start + count
    pieces = channel_pieces(start, end, widest, narrowest)
    channels = [c for first, _, past in pieces for c in range(first, past)]
    assert channels == list(range(start, end))
    for first, width, past in pieces:
        assert width & (width - 1) == 0
        assert narrowest <= width <= widest
        assert past - first == width or past == end


@pytest.mark.parametrize(
    ("d", "widths"), [(192, [128, 64]), (576, [128] * 4 + [64]), (224, [128, 64, 32]), (5, [16])]
)
def test_head_dims_of_the_models(d: int, widths: list[int]) -> None:
    assert [width for _, width, _ in channel_pieces(0, d, 128)] == widths
