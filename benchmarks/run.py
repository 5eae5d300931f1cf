"""Operators on this GPU, beside any module with the `flash_mla` interface and PyTorch's own.

    python -m benchmarks.run [--operator sparse_decode] [--peer MODULE] [--record]
        [--test-processes 8]

First runs the operators' GPU tests and refuses to time anything while one fails. Then prints, for
each case, microseconds (median, min-max), GB/s, TFLOPS, and percent of the two ceilings measured in
the same process (device copy, bf16 matrix product). The peer and a case's own rivals are timed on
the same inputs in the same process; ratio = their time / ours, gap = how far the results differ,
and one that cannot run shows why. With --graph one that waits for the device is timed without.
`--record` appends the rows to benchmarks/results/<gpu>.jsonl.
"""

from __future__ import annotations

import argparse
import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Literal

import torch

from benchmarks.cases import MODULES, Call, Case
from benchmarks.gate import run_tests, tree_name
from benchmarks.record import append_rows, circumstances
from model1.testing.timing import (
    Ceilings,
    Timing,
    measure_ceilings,
    time_call,
    waits_for_device,
)

OPERATORS = {module.OPERATOR: module for module in MODULES}


def similarity_gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - 2 <a, b> / (<a, a> + <b, b>) in fp64."""
    a, b = a.double().flatten(), b.double().flatten()
    return float(1.0 - 2.0 * (a @ b) / (a @ a + b @ b))


def measure(case: Case, peer: Any, ceilings: Ceilings, *, graph: bool) -> dict[str, Any]:
    """One row: ours and, on the same inputs, what it is compared with."""
    work = case.build(torch.device("cuda"))
    call = work.bind(importlib.import_module("model1.flash_mla"))
    timing = time_call(call, graph=graph)
    tflops = work.flop / timing.median_us / 1e6
    gb_per_s = work.num_bytes / timing.median_us / 1e3
    row: dict[str, Any] = {
        "operator": case.operator, "case": case.name, "graph": graph, "us": asdict(timing),
        "tflops": tflops, "percent_of_matmul": 100 * tflops / ceilings.bf16_tflops,
        "gb_per_s": gb_per_s, "percent_of_copy": 100 * gb_per_s / ceilings.copy_gb_per_s,
    }  # fmt: skip
    rivals = dict(work.rivals)
    if peer is not None and work.takes_peer:
        rivals[peer.__name__] = functools.partial(work.bind, peer)
    row["rivals"] = {name: compare(run, call, timing, graph) for name, run in rivals.items()}
    return row


def compare(prepare: Callable[[], Call], ours: Call, timing: Timing, graph: bool) -> dict[str, Any]:
    """Another call beside ours; whatever keeps it from running is its result."""
    try:
        call = prepare()
        in_graph = graph and not waits_for_device(call)
        rival = time_call(call, graph=in_graph)
        gap = similarity_gap(ours()[0], call()[0])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return {"error": f"{type(error).__name__}: {lines[0]}"}
    ratio = rival.median_us / timing.median_us
    return {"us": asdict(rival), "ratio": ratio, "gap": gap, "graph": in_graph}


def format_row(row: dict[str, Any]) -> str:
    """One line of the printed table, and one for each rival."""
    us = Timing(**row["us"])
    lines = [
        f"{row['operator']:14} {row['case']:34} {us.median_us:9.1f} us "
        f"({us.min_us:.1f}-{us.max_us:.1f}) {row['tflops']:6.0f} TFLOPS "
        f"{row['percent_of_matmul']:3.0f}% {row['gb_per_s']:6.0f} GB/s "
        f"{row['percent_of_copy']:3.0f}%"
    ]
    for name, rival in row["rivals"].items():
        if "error" in rival:
            lines.append(f"    {name}: {rival['error']}")
        else:
            us = Timing(**rival["us"])
            lines.append(
                f"    {name}: {us.median_us:.1f} us ({us.min_us:.1f}-{us.max_us:.1f}), "
                f"ratio {rival['ratio']:.2f}, gap {rival['gap']:.0e}"
                + (", no graph: it waits for the device" if row["graph"] > rival["graph"] else "")
            )
    return "\n".join(lines)


def run_case(
    case: Case,
    peer: Any,
    ceilings: Ceilings,
    *,
    graph: bool,
    about: dict[str, Any] | Literal[False],
) -> None:
    """Measure, print and, with what is to be said `about` it, record at once: a run may be cut."""
    # a gradient is computed on the stream of its forward: not the default one, which no graph can
    # capture
    with torch.cuda.stream(torch.cuda.Stream()):
        row = measure(case, peer, ceilings, graph=graph)
    print(format_row(row), flush=True)
    if about:
        append_rows([row], about)
    torch.cuda.empty_cache()


def main() -> None:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--operator", action="append", choices=sorted(OPERATORS), help="repeatable")
    parser.add_argument("--match", default="", help="only cases whose name holds this text")
    parser.add_argument("--peer", help="module with the flash_mla interface")
    parser.add_argument("--graph", action="store_true", help="time the replay of a CUDA graph")
    parser.add_argument("--skip-tests", action="store_true", help="only without --record")
    parser.add_argument(
        "--test-processes", type=int, default=1, metavar="N", help="share the tests"
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument(
        "--commit", metavar="NAME", help="recorded for a copied tree that has no history of its own"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch.cuda.is_available() is False")
    if options.skip_tests and options.record:
        parser.error("--record needs passing tests: drop --skip-tests")
    operators = options.operator or list(OPERATORS)
    try:
        commit = tree_name(options.commit) if options.record else ""
    except ValueError as error:
        parser.error(str(error))
    if not options.skip_tests:
        patterns = [pattern for operator in operators for pattern in OPERATORS[operator].TESTS]
        run_tests(patterns, options.test_processes)
    peer = importlib.import_module(options.peer) if options.peer else None
    ceilings = measure_ceilings(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}: copy {ceilings.copy_gb_per_s:.0f} GB/s, "
          f"bf16 matmul {ceilings.bf16_tflops:.0f} TFLOPS")  # fmt: skip
    cases = [case for operator in operators for case in OPERATORS[operator].cases()]
    about = circumstances("benchmarks.run", commit) | asdict(ceilings)
    for case in cases:
        if options.match in case.name:
            run_case(case, peer, ceilings, graph=options.graph, about=options.record and about)


if __name__ == "__main__":
    main()
