"""One training step of Model1 with each part on and off, beside plain transformers of its size.

    python -m benchmarks.training_step [--only NAME ...] [--profile] [--record [--commit NAME]]

Real steps of `model1.train.step.TrainStep`, which `model1 train` repeats, compiled as the training
file says, on random tokens, one document a row. Each configuration of `benchmarks.training_models`
gets one line: median milliseconds of a step and of its two halves (gradients; clipping and
update), tokens/s, the operations of `flop_per_token` as a share of the GPU's published dense bf16
rate (MFU) and of a matrix product measured in this process, peak memory, seconds of the first step
(which compiles). A table of what each part costs ends the output; it uses rows that were recorded
for the same commit and settings where a configuration did not run now, so that one call need not
have time for all. `--profile` prints the kernels of one more step, grouped.

Runs the GPU test of a step first; `--skip-tests` leaves it out, and recorded rows say so.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gate import run_tests, tree_name
from benchmarks.record import append_rows, circumstances, device_name, results_path
from benchmarks.training_models import NAMES, PLAIN, SWITCHED_OFF, build, flop_per_token, size_of
from benchmarks.training_profile import profile_step
from model1.testing.timing import Ceilings, measure_ceilings
from model1.tokenizer import Tokenizer
from model1.train.config import TrainConfig, load_train_config
from model1.train.data import Batch
from model1.train.step import TrainStep

OPERATOR = "training_step"
CONFIG = "configs/small_100m.toml"
TESTS = ("tests/train/test_step.py",)
# Dense bf16 TFLOPS of NVIDIA's data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H200": 989.5, "H100 80GB HBM3": 989.5, "A100": 312.0}

Row = dict[str, Any]
Clock = Callable[[], Callable[[], float]]


def random_batch(config: TrainConfig, vocab_size: int) -> Batch:
    """One batch of uniform tokens on the CPU; a row is one document, so attention is widest."""
    shape = (config.data.batch_rows, config.data.seq_len + 1)
    ids = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.zeros_like(ids[:, :-1]))


def time_steps(step: TrainStep, batch: Batch, num_steps: int) -> list[tuple[float, float]]:
    """Milliseconds of gradients and of the update, for each of `num_steps` steps in a row.

    On a GPU by events, without waiting in between, as a run goes on.
    """
    stamps = []
    for _ in range(num_steps):
        begin = _stamp(step.device)
        step.gradients(batch)
        middle = _stamp(step.device)
        step.update(1e-3)
        stamps.append((begin, middle, _stamp(step.device)))
    _wait(step.device)
    return [(_ms(begin, middle), _ms(middle, end)) for begin, middle, end in stamps]


def _stamp(device: torch.device) -> torch.cuda.Event | float:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _ms(begin: Any, end: Any) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(
    name: str, config: TrainConfig, *, num_steps: int, warmup: int, profile: bool = False
) -> Row:
    """One configuration: its row, without what it was measured on."""
    device = torch.device(config.device)
    tokenizer = Tokenizer.from_dir(config.data.tokenizer)
    model = build(name, config, tokenizer).to(device)
    size = size_of(model)
    step, batch = TrainStep(model, config, device), random_batch(config, tokenizer.vocab_size)
    begin = time.perf_counter()
    first_loss = _first_step(step, batch)
    first_step_s = time.perf_counter() - begin
    print(f"{name}: first step {first_step_s:.1f} s, loss {first_loss:.3f}", flush=True)
    time_steps(step, batch, warmup)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    halves = time_steps(step, batch, num_steps)
    flop = flop_per_token(size, config.data.seq_len)
    row = {
        "operator": OPERATOR, "case": name, "settings": settings_of(config),
        "ms": _spread(map(sum, halves)), "gradients_ms": _spread(g for g, _ in halves),
        "update_ms": _spread(u for _, u in halves), "num_steps": num_steps,
        "parameters": size._asdict(), "first_step_s": first_step_s, "first_loss": first_loss,
        **rates(statistics.median(map(sum, halves)), config, flop),
    }  # fmt: skip
    if device.type == "cuda":
        row["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    if profile:
        print(profile_step(step, batch), flush=True)
    return row


def _first_step(step: TrainStep, batch: Batch) -> float:
    loss = float(step.gradients(batch)["cross_entropy"])
    step.update(1e-3)
    _wait(step.device)
    if not math.isfinite(loss):
        raise RuntimeError(f"the first loss is {loss}")
    return loss


def settings_of(config: TrainConfig) -> Row:
    """What two rows must share to be compared."""
    data, model = config.data, config.model
    return {
        "preset": model.preset, "seq_len": data.seq_len, "batch_rows": data.batch_rows,
        "micro_batch_rows": data.micro_batch_rows, "chunk_tokens": config.loss.chunk_tokens,
        "precision": config.precision, "compile": config.compile,
        "dense_attention": model.dense_attention,
    }  # fmt: skip


def rates(ms: float, config: TrainConfig, flop: float) -> Row:
    """Tokens a second, TFLOPS, and their share of the published rate where that is known."""
    tokens_per_s = 1e3 * config.data.batch_rows * config.data.seq_len / ms
    tflops = tokens_per_s * flop / 1e12
    name = device_name()
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    mfu = None if peak is None else 100.0 * tflops / peak
    rest = {"tflops": tflops, "mfu_percent": mfu, "flop_per_token": flop}
    return {"tokens_per_s": tokens_per_s, **rest}


def format_row(row: Mapping[str, Any], ceilings: Ceilings | None) -> str:
    """One line of the printed table."""
    count, ms = row["parameters"], row["ms"]
    mfu = row["mfu_percent"]
    share = "" if mfu is None else f", MFU {mfu:.1f} %"
    if ceilings is not None:
        share += f" ({100 * row['tflops'] / ceilings.bf16_tflops:.1f} % of a matrix product)"
    memory = f", peak {row['peak_memory_gb']:.1f} GB" if "peak_memory_gb" in row else ""
    return (
        f"{row['case']:16} {ms['median']:8.1f} ms ({ms['min']:.1f}-{ms['max']:.1f}): gradients "
        f"{row['gradients_ms']['median']:.1f}, update {row['update_ms']['median']:.1f}; "
        f"{row['tokens_per_s']:,.0f} tokens/s, {row['tflops']:.0f} TFLOPS{share}{memory}; "
        f"{(count['total'] - count['rows']) / 1e6:.1f} M parameters + {count['rows'] / 1e6:.1f} M "
        f"in rows, {count['products'] / 1e6:.1f} M in products"
    )


def cost_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What a step with everything on loses where a part is off, and each time over plain's.

    A part takes its parameters along; nothing fills them up again.
    """
    ms = {name: rows[name]["ms"]["median"] for name in NAMES if name in rows}
    lines = [f"{'configuration':16} {'ms':>8} {'of all':>8} {'part, ms':>9} {'over plain':>11}"]
    for name, value in ms.items():
        cells = ["", "", ""]
        if "all" in ms:
            cells[0] = f"{value / ms['all']:.3f}"
            if name in SWITCHED_OFF and name != "all":
                cells[1] = f"{ms['all'] - value:.1f}"
        if PLAIN in ms:
            cells[2] = f"{value / ms[PLAIN]:.3f}"
        lines.append(f"{name:16} {value:8.1f} {cells[0]:>8} {cells[1]:>9} {cells[2]:>11}")
    return "\n".join(lines)


def recorded_rows(settings: Row, commit: str) -> dict[str, Row]:
    """The last recorded row of each configuration with these settings at this commit."""
    path = results_path(device_name())
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row.get("operator") == OPERATOR]
    same = [row for row in rows if (row["settings"], row["commit"]) == (settings, commit)]
    return {row["case"]: row for row in same}


def run(
    names: Iterable[str], config: TrainConfig, commit: str, options: argparse.Namespace
) -> tuple[dict[str, Row], bool]:
    """Measure, print and, if asked, record each; the rows, and whether all could be measured."""
    is_cuda = config.device == "cuda"
    ceilings = measure_ceilings(torch.device("cuda")) if is_cuda else None
    if ceilings is not None:
        print(f"{device_name()}: copy {ceilings.copy_gb_per_s:.0f} GB/s, "
              f"bf16 matmul {ceilings.bf16_tflops:.0f} TFLOPS", flush=True)  # fmt: skip
    rows = recorded_rows(settings_of(config), commit) if commit else {}
    complete = True
    for name in names:
        print(f"{name}: building", flush=True)
        try:
            row = measure(name, config, num_steps=options.steps, warmup=options.warmup,
                          profile=options.profile)  # fmt: skip
        except Exception as error:  # whatever keeps one from running, the others still may
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
            complete = False
        else:
            rows[name] = row
            print(format_row(row, ceilings), flush=True)
            if options.record:
                about = circumstances("benchmarks.training_step", commit)
                about |= {"tested": not options.skip_tests}
                append_rows([row], about | (asdict(ceilings) if ceilings else {}))
        release()
    return rows, complete


def release() -> None:
    """Forget the graphs and the memory of the last configuration."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Command line; see the module docstring. The exit code is 1 if a configuration failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", action="append", choices=NAMES, help="repeatable")
    parser.add_argument("--config", default=CONFIG, help="training file of a Model1 preset")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps after the first, not timed")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--commit", metavar="NAME", help="of a copied tree without history")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.warmup < 0:
        parser.error("--steps must be at least 1 and --warmup at least 0")
    config = load_train_config(options.config, options.set)
    if config.model.kind != "model1" or config.model.preset is None or config.model.switch_off:
        parser.error(f"{options.config} must train a preset of kind 'model1' with nothing off")
    if config.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA device, torch.cuda.is_available() is False")
    if options.record and config.device != "cuda":
        parser.error("--record is for a GPU")
    try:
        commit = tree_name(options.commit) if options.record else ""
    except ValueError as error:
        parser.error(str(error))
    if config.device == "cuda" and not options.skip_tests:
        run_tests(TESTS, 1)
    rows, complete = run(options.only or NAMES, config, commit, options)
    print(cost_table(rows))
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
