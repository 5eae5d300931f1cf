"""Generation on this machine's CPU: the shipped checkpoint beside a Llama of the same size.

`python -m benchmarks.cpu_generation` prints a table; `--record` also appends JSON lines to
`benchmarks/results/cpu.jsonl`. Each contender runs in a process of its own, one after the other,
with the same prompt lengths, greedy, to the full number of tokens. Rates count every generated
token over the whole call, prompt included; a first token is a call for one. Prompts are random
ids, new in each call, so that no cache of an earlier one serves them; so are the peer's weights.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import importlib
import importlib.metadata
import itertools
import json
import os
import platform
import random
import re
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
CONTENDERS = ("model1-int8", PEER, "model1-fp32")  # int8 is the engine's default on a CPU
VOCAB_SIZE = 8192
PEER_PARAMETERS = 24_278_400  # the shipped checkpoint has 24_296_069
WARM_UP_TOKENS = 16
LINE = "{:12} {:>7} {:>5}" + 3 * " {:>23}"  # name, threads, load average, one cell for each case

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
class Row:
    """One result: `tokens_per_s`, or the `seconds` of a call where that is None."""

    name: str
    threads: int | None  # of torch; None: its own choice
    case: Case
    repeats: int
    seconds: dict[str, float]  # median, min and max of the repeats
    tokens_per_s: dict[str, float] | None
    load_average: float  # of the machine in the minute before this contender began


def spread(values: Sequence[float]) -> dict[str, float]:
    """What a row says of its repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def cases(new_tokens: int) -> list[Case]:
    """What every contender is asked for."""
    return [
        Case("1 request, tokens/s", 1, 64, new_tokens),
        Case("8 requests, tokens/s", 8, 64, new_tokens),
        Case("first token of 512, s", 1, 512, 1),
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
        eos_token_id=None,  # nothing ends an answer early
        pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    assert sum(p.numel() for p in model.parameters()) == PEER_PARAMETERS

    def generate(prompts: list[list[int]], new_tokens: int) -> int:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new_tokens, "do_sample": False, "use_cache": True}
        answers = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return answers.numel() - ids.numel()

    return generate


def run_contender(name: str, threads: int, new_tokens: int, repeats: int) -> list[Row]:
    """Load one contender into this process and measure every case; sets torch's thread count."""
    import torch

    load_average = round(os.getloadavg()[0], 2)
    torch.set_num_threads(threads)
    generate = load_peer() if name == PEER else load_model1(name.removeprefix("model1-"))
    rows = []
    for case in cases(new_tokens):
        seconds = time_case(generate, case, repeats)
        num_tokens = case.batch * case.new_tokens
        rates = spread([num_tokens / s for s in seconds]) if num_tokens > 1 else None
        rows.append(Row(name, threads, case, repeats, spread(seconds), rates, load_average))
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

    load_average = round(os.getloadavg()[0], 2)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        with server([], collections.deque(maxlen=1)):
            seconds.append(time.perf_counter() - start)
    case = Case("server start, s", 0, 0, 0)
    return Row("model1-serve", None, case, repeats, spread(seconds[1:]), None, load_average)


def circumstances(arguments: Sequence[str]) -> dict[str, Any]:
    """What a row must say beside its numbers: machine, versions, commit, command, date."""
    git = ["git", "-C", str(ROOT)]
    status = [*git, "status", "--porcelain", "--", "model1", "checkpoints", __file__]
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on most Linux systems
    cpu = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    versions = {package.name: package.version for package in importlib.metadata.distributions()}
    return {
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "niceness": os.nice(0),
        "torch": versions["torch"],
        "transformers": versions.get("transformers"),
        "commit": subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip(),
        "has_changes": subprocess.check_output(status) != b"",
        "command": " ".join(["python -m benchmarks.cpu_generation", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def show(row: Row) -> str:
    """Median (min-max)."""
    return "{median:.4g} ({min:.4g}-{max:.4g})".format(**row.tokens_per_s or row.seconds)


def factors(rows: Sequence[Row], name: str) -> list[str]:
    """For each case: how many times as fast as the peer, both at their best thread count."""

    def best_s(name: str, case: Case) -> float:
        return min(r.seconds["median"] for r in rows if (r.name, r.case) == (name, case))

    all_cases = dict.fromkeys(row.case for row in rows)
    return [f"{best_s(PEER, case) / best_s(name, case):.2f} x peer" for case in all_cases]


def main(arguments: Sequence[str]) -> int:
    """Measure what is asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS[:2])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="of torch")
    parser.add_argument("--new-tokens", type=int, default=128, help="of each request")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-server", action="store_true", help="skip the start of the server")
    parser.add_argument("--record", action="store_true", help=f"append to {RESULTS.name}")
    options = parser.parse_args(arguments)
    if min(options.repeats, options.new_tokens - 1, *options.threads) < 1:
        parser.error("--repeats and --threads must be at least 1, --new-tokens at least 2")
    facts = circumstances(arguments)
    names = options.contenders
    if PEER in names and facts["transformers"] is None:
        print(f"without {PEER}: install the [hf] extra")
        names = [name for name in names if name != PEER]
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    titles = [case.case for case in cases(options.new_tokens)]
    print(LINE.format("", "threads", "load", *titles))
    rows: list[Row] = []
    for name, threads in itertools.product(names, options.threads):
        rows += in_own_process(name, threads, options.new_tokens, options.repeats)
        cells = [show(row) for row in rows[-len(titles) :]]
        print(LINE.format(name, threads, rows[-1].load_average, *cells), flush=True)
    for name in [name for name in names if name != PEER and PEER in names]:
        print(LINE.format(name, "best", "", *factors(rows, name)))
    if not options.no_server:
        rows.append(run_server_starts(options.repeats))
        print(f"server ready after {show(rows[-1])} s, target < 8 s")
    if options.record:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            for row in map(dataclasses.asdict, rows):
                file.write(json.dumps(row | row.pop("case") | facts) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
