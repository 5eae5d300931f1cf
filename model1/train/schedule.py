"""Learning-rate schedules over training progress.

Progress is max(step / max_steps, elapsed / max_seconds), so a run that is given exactly N seconds
decays fully whatever its speed. Elapsed seconds are those of all sittings of the run together.
With `max_seconds` two runs see different factors; only a run bounded by steps repeats bitwise.
"""

from __future__ import annotations

import math

from model1.train.config import ScheduleSection


def progress(schedule: ScheduleSection, step: int, elapsed_seconds: float) -> float:
    """Share of the run that is over before `step` (0-based), in [0, 1]."""
    share = step / schedule.max_steps
    if schedule.max_seconds is not None:
        share = max(share, elapsed_seconds / schedule.max_seconds)
    return min(share, 1.0)


def lr_factor(schedule: ScheduleSection, step: int, elapsed_seconds: float) -> float:
    """What every learning rate is multiplied with at `step`.

    warm-up: (step + 1) / warmup_steps until 1, times, at progress p and floor f = final_factor,
    cosine:  f + (1 - f) (1 + cos(pi p)) / 2
    wsd:     1 until p = 1 - decay_fraction, then linear to f at p = 1 (arXiv 2404.06395).
    """
    share = progress(schedule, step, elapsed_seconds)
    floor = schedule.final_factor
    if schedule.kind == "cosine":
        factor = floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * share))
    else:
        left = 1.0 - share
        decay = schedule.decay_fraction
        factor = 1.0 if left >= decay else floor + (1.0 - floor) * left / decay
    if schedule.warmup_steps:
        factor *= min(1.0, (step + 1) / schedule.warmup_steps)
    return factor
