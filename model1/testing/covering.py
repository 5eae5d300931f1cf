"""Which launches of a kernel to compile where there is no time for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from model1.ops.compile_cases import CompileCase


def covering(cases: Sequence[CompileCase]) -> list[int]:
    """Indices of few cases in which every kernel has all that it has in any of them.

    That is each launch configuration (warps, stages and all BLOCK_ sizes together), each value of
    each compile-time parameter that is no size (flags, formats, types, what is absent), and each
    type of the others; not each combination of these. Found greedily: of cases that add as much,
    the one with the largest sizes, which needs the most registers and shared memory.
    """
    choices = [_choices(case) for case in cases]
    sizes = [sum(filter(_is_size, case.constexprs.values())) for case in cases]
    left = set[object]().union(*choices)
    chosen = set[int]()
    while left:
        best = max(range(len(cases)), key=lambda i: (len(left & choices[i]), sizes[i]))
        chosen.add(best)
        left -= choices[best]
    return sorted(chosen)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _choices(case: CompileCase) -> set[object]:
    blocks = {name: x for name, x in case.constexprs.items() if name.startswith("BLOCK_")}
    found: set[object] = {(case.num_warps, case.num_stages, *sorted(blocks.items()))}
    for name in inspect.signature(case.kernel.fn).parameters:
        if name not in case.constexprs:
            found.add((name, case.signature[name]))
        elif not _holds_sizes(value := case.constexprs[name]):
            found.add((name, str(value)))
    return {(case.kernel.fn.__name__, choice) for choice in found}


def _holds_sizes(value: Any) -> bool:
    """Whether it is a size, or pieces of channels, which follow from sizes."""
    is_plain = type(value) is tuple  # a NamedTuple is a format
    return all(map(_holds_sizes, value)) if is_plain else _is_size(value)
