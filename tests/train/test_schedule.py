from __future__ import annotations

from typing import Any, Literal

import pytest

from model1.train.config import ScheduleSection
from model1.train.schedule import lr_factor, progress


def schedule(kind: Literal["cosine", "wsd"] = "wsd", **changes: Any) -> ScheduleSection:
    return ScheduleSection(kind=kind, max_steps=100, **changes)


def test_warm_up_rises_to_one() -> None:
    s = schedule(warmup_steps=10)
    assert [lr_factor(s, i, 0.0) for i in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])


def test_wsd_holds_then_falls_linearly_to_the_floor() -> None:
    s = schedule(decay_fraction=0.2, final_factor=0.1)
    values = [lr_factor(s, i, 0.0) for i in (50, 80, 90, 100)]
    assert values == pytest.approx([1.0, 1.0, 0.55, 0.1])


def test_cosine_is_half_way_in_the_middle() -> None:
    s = schedule("cosine", final_factor=0.2)
    assert [lr_factor(s, i, 0.0) for i in (0, 50, 100)] == pytest.approx([1.0, 0.6, 0.2])


def test_the_nearer_of_steps_and_seconds_decides() -> None:
    s = schedule("cosine", max_seconds=50.0)
    assert progress(s, 10, 25.0) == 0.5
    assert progress(s, 70, 25.0) == 0.7
    assert progress(s, 10, 60.0) == 1.0
    assert lr_factor(s, 10, 50.0) == pytest.approx(0.0)
