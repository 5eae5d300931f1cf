"""kill -9 at random points of a save: the checkpoint is always the old or the new one, whole."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights.conftest import PROVENANCE, Trained

from model1.weights import read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, MOST_ROUNDS = 8, 60
# One process imports torch once, saves version 0, prints how long that took, and then forks a
# writer of further versions per line of input, which it kills after the given number of seconds.
# Version n of the model has every weight of the last norm equal to n.
WRITER = """
import itertools, os, signal, sys, time
import torch
from model1.weights import load_state, read_checkpoint, save_checkpoint
target, original = sys.argv[1:]
checkpoint = read_checkpoint(original)
config, state = load_state(original)
def save(n):
    state["norm.weight"] = torch.full_like(state["norm.weight"], float(n))
    provenance = {**checkpoint.manifest.provenance, "version": n}
    save_checkpoint(target, state, config, tokenizer=checkpoint.tokenizer,
                    provenance=provenance, max_shard_bytes=200_000)
save(0)
start = time.monotonic()
save(0)
print(time.monotonic() - start, flush=True)
for line in sys.stdin:
    first, seconds = line.split()
    child = os.fork()
    if child == 0:
        for n in itertools.count(int(first)):
            save(n)
    time.sleep(float(seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print("killed", flush=True)
"""


def version(target: Path) -> int:
    checkpoint = read_checkpoint(target)
    weight = checkpoint.state.tensors["norm.weight"]
    assert torch.equal(weight, weight[:1].expand_as(weight))
    assert checkpoint.manifest.provenance["version"] == int(weight[0])
    return int(weight[0])


@pytest.mark.slow
def test_kill_at_random_points(saved: Path, small: Trained, tmp_path: Path) -> None:
    target = tmp_path / "c"
    command = [sys.executable, "-c", WRITER, str(target), str(saved)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdin is not None
        assert writer.stdout is not None
        save_seconds = float(writer.stdout.readline())
        versions = [version(target)]
        while len(versions) <= ROUNDS or (versions[-1] == 0 and len(versions) <= MOST_ROUNDS):
            delay = random.uniform(0.0, 3.0 * save_seconds)
            print(versions[-1] + 1, delay, file=writer.stdin, flush=True)
            assert writer.stdout.readline() == "killed\n"
            versions.append(version(target))
        writer.stdin.close()
        assert writer.wait() == 0
    assert versions == sorted(versions)
    assert versions[-1] > 0  # some saves did come through
    save_checkpoint(
        target,
        small.model.state_dict(),
        small.config,
        tokenizer=small.tokenizer,
        provenance=PROVENANCE,
    )
    assert os.listdir(tmp_path) == ["c"]
