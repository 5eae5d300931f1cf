"""Generation on this machine's CPU: the shipped checkpoint beside a Llama of the same size.

`python -m benchmarks.cpu_generation` prints a table; `--record` also appends JSON lines to
`benchmarks/results/cpu.jsonl`. Each contender runs in a process of its own, one after the other,
with the same prompt lengths, greedy, to the full number of tokens. Rates count every generated
token over the whole call, prompt included; a first token is a call for one. Prompts are random
ids, new ones in each call, so that nothing kept from an earlier one can serve them. The peer has
random weights: its speed does not depend on them. What the answers are worth is not measured.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.jsonl"
PEER = "llama-fp32"
CONTENDERS = ("model1-int8", "model1-fp32", PEER)  # int8 is the engine's default on a CPU
VOCAB_SIZE = 8192
PEER_PARAMETERS = 24_278_400  # the shipped checkpoint has 24_296_069
WARM_UP_TOKENS = 16
START_TARGET_S = 8.0

# Continues every prompt greedily by the given number of tokens; returns how many came in all.
Generate = Callable[[list[list[int]], int], int]


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of call; tokens are of each request."""

    case: str
    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Row:
    """One result: `tokens_per_s`, or the `seconds` of a call where that is None."""

    name: str
    threads: int | None  # of torch; None: its own choice
    case: Case
    repeats: int
    seconds: Spread
    tokens_per_s: Spread | None
    load_average: float  # of the machine in the minute before this contender began

    def to_dict(self) -> dict[str, Any]:
        """Flat, for JSON."""
        row = dataclasses.asdict(self)
        return row | row.pop("case")


def cases(new_tokens: int) -> list[Case]:
    """What every contender is asked for."""
    return [
        Case("1 request, tokens/s", 1, 64, new_tokens),
        Case("8 requests, tokens/s", 8, 64, new_tokens),
        Case("first of 512, ms", 1, 512, 1),
    ]


def load_model1(dtype: str) -> Generate:
    """The shipped checkpoint behind `model1.LLM`; engine options but the dtype are the defaults."""
    from model1 import LLM, SamplingParams

    llm = LLM(device="cpu", dtype=dtype)

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        return sum(len(answer.token_ids) for answer in llm.generate(prompts, params))

    return generate


def load_peer() -> Generate:
    """`transformers.LlamaForCausalLM`: fp32, `generate()` with its default attention and cache."""
    import torch

    # By name: transformers is an extra, and type checkers run without it.
    transformers: Any = importlib.import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1016,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # nothing ends an answer early
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    num_parameters = sum(p.numel() for p in model.parameters())
    if num_parameters != PEER_PARAMETERS:
        raise RuntimeError(f"the peer must have {PEER_PARAMETERS} parameters, got {num_parameters}")

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
        answers = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return answers.numel() - ids.numel()

    return generate


def run_contender(name: str, threads: int, new_tokens: int, repeats: int) -> list[Row]:
    """Load one contender into this process and measure every case; sets torch's thread count."""
    import torch

    load_average = os.getloadavg()[0]
    torch.set_num_threads(threads)
    generate = load_peer() if name == PEER else load_model1(name.removeprefix("model1-"))
    rows = []
    for case in cases(new_tokens):
        seconds = time_case(generate, case, repeats)
        num_tokens = case.batch * case.new_tokens
        rates = Spread.of([num_tokens / s for s in seconds]) if num_tokens > 1 else None
        rows.append(Row(name, threads, case, repeats, Spread.of(seconds), rates, load_average))
    return rows


def time_case(generate: Generate, case: Case, repeats: int) -> list[float]:
    """Seconds of each repeat, after one shorter call that does not count."""
    rng = random.Random(0)
    seconds = []
    for new_tokens in [min(case.new_tokens, WARM_UP_TOKENS)] + [case.new_tokens] * repeats:
        prompts = [rng.choices(range(VOCAB_SIZE), k=case.prompt_tokens) for _ in range(case.batch)]
        start = time.perf_counter()
        num_generated = generate(prompts, new_tokens)
        seconds.append(time.perf_counter() - start)
        if num_generated != case.batch * new_tokens:
            raise RuntimeError(f"asked for {case.batch * new_tokens} tokens, got {num_generated}")
    return seconds[1:]


def in_own_process(*arguments: Any) -> list[Row]:
    """`run_contender` in a fresh process, which has ended when this returns."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_contender, *arguments).result()


def run_server_starts(repeats: int) -> Row:
    """`model1 serve` until /health/ready answers 200; one start before does not count."""
    from model1.cli.demo import server

    load_average = os.getloadavg()[0]
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with server([], collections.deque(maxlen=1)):
            seconds.append(time.perf_counter() - start)
    case = Case("server start, ms", 0, 0, 0)
    return Row("model1-serve", None, case, repeats, Spread.of(seconds[1:]), None, load_average)


def circumstances(arguments: Sequence[str]) -> dict[str, Any]:
    """What a row must say beside its numbers: machine, versions, commit, command, date."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    cpus = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    versions = [importlib.metadata.version(n) if has(n) else None for n in ("torch", "transformers")]
    return {
        "cpu": cpus[0] if cpus else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "niceness": os.nice(0),
        "torch": versions[0],
        "transformers": versions[1],
        "commit": git("rev-parse", "HEAD"),
        "has_changes": bool(git("status", "--porcelain", "--", "model1", "checkpoints", __file__)),
        "command": shlex.join(["python", "-m", "benchmarks.cpu_generation", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def has(module: str) -> bool:
    """Whether a module is installed."""
    return importlib.util.find_spec(module) is not None


def print_table(rows: Sequence[Row]) -> None:
    """Median (min-max) of each result, and what the peer's median makes of it: > 1 is faster."""
    peer = {(r.case, r.threads): r for r in rows if r.name == PEER}
    ...
