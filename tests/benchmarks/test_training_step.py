"""The training benchmark on tiny sizes: real steps are timed, sizes and operations are counted."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import training_step
from benchmarks.training_models import NAMES, build, flop_per_token, plain_shape, size_of
from benchmarks.training_profile import (
    Kernel,
    format_idle,
    format_profile,
    group_of_kernel,
    idle_times,
    kernels_of,
)
from benchmarks.training_step import cost_table, main, measure
from model1 import presets
from model1.errors import ConfigError
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.config import load_train_config

TINY = "configs/tiny.toml"
SHORT = ("data.seq_len=16", "data.batch_rows=2", "data.micro_batch_rows=1")


def test_every_configuration_runs_a_step() -> None:
    config = load_train_config(TINY, SHORT)
    for name in NAMES:
        row = measure(name, config, num_steps=1, warmup=0)
        halves = row["gradients_ms"]["median"] + row["update_ms"]["median"]
        assert row["ms"]["median"] == pytest.approx(halves)
        assert row["tokens_per_s"] == pytest.approx(32 / row["ms"]["median"] * 1e3)
        assert row["tflops"] == pytest.approx(row["tokens_per_s"] * row["flop_per_token"] / 1e12)
        assert row["first_loss"] == pytest.approx(9.01, rel=0.02)  # ln 8192


def test_plain_models_have_the_parameters_of_model1() -> None:
    preset = presets.small_100m(compressed_vocab_size=6000)
    with torch.device("meta"):
        model = Model(preset, compression_table=np.arange(8192) % 6000)
    size = size_of(model)
    thinking = size.total - size.rows
    assert 95e6 < thinking < 105e6
    assert size.products < thinking < 1.001 * size.products
    for total in (thinking, size.total):
        shape = plain_shape(model.config, total, 4096)
        assert shape.num_parameters == pytest.approx(total, rel=0.02)
        assert (shape.hidden_size, shape.num_hidden_layers) == (768, 12)
        # as many score and value channels as Model1's heads together
        assert 2 * shape.num_hidden_layers * shape.hidden_size == size.channels
    with pytest.raises(ConfigError, match=r"12 layers has 100 parameters within 2 %"):
        plain_shape(model.config, 100, 4096)


def test_operations_are_those_of_the_products() -> None:
    tokenizer = Tokenizer.from_dir(load_train_config(TINY).data.tokenizer)
    model = build("plain", load_train_config(TINY), tokenizer)
    size = size_of(model)
    shape = model.config  # type: ignore[union-attr]
    norms = (2 * shape.num_hidden_layers + 1) * shape.hidden_size  # type: ignore[union-attr]
    assert size.total == size.products + norms
    forward = 2 * size.products + 2 * size.channels * (1 + 2 + 3) / 3  # rows of three tokens
    assert flop_per_token(size, 3) == pytest.approx(3 * forward)


def test_the_table_says_what_a_part_costs() -> None:
    times = {"all": 120.0, "no-mhc": 100.0, "plain": 96.0}
    table = cost_table({name: {"ms": {"median": ms}} for name, ms in times.items()})
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert cells == {
        "all": ["120.0", "1.000", "1.250"],
        "no-mhc": ["100.0", "0.833", "20.0", "1.042"],
        "plain": ["96.0", "0.800", "1.000"],
    }


def test_a_failed_configuration_is_said_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = training_step.measure

    def fail_once(name: str, *args: object, **options: object) -> object:
        if name == "all":
            raise RuntimeError("out of something")
        return original(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(training_step, "measure", fail_once)
    arguments = ["--config", TINY, "--steps", "1", "--warmup", "0", "--profile"]
    sets = [part for text in SHORT for part in ("--set", text)]
    assert main([*arguments, *sets, "--only", "all", "--only", "plain"]) == 1
    printed = capsys.readouterr().out
    assert "all: RuntimeError: out of something" in printed
    assert "tokens/s" in printed
    assert "matrix products" in printed
    assert printed.splitlines()[-1].startswith("plain")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--record", "--config", TINY], "--record is for a GPU"),
        (["--config", "configs/plain_small.toml"], "must train a preset of kind 'model1'"),
        (["--only", "half"], "invalid choice: 'half'"),
    ],
)
def test_wrong_arguments_are_errors(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


# --- profile -----------------------------------------------------------------------------

DEVICES = torch.autograd.DeviceType


def event(name: str, start: float, end: float, thread: int, **more: object) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    fields = {"device_type": DEVICES.CPU, "kernels": (), "is_user_annotation": False}
    return SimpleNamespace(name=name, time_range=span, thread=thread, **fields | more)


def test_kernels_are_counted_once_and_by_the_phase_that_launched_them() -> None:
    def launch(name: str, us: float) -> dict[str, object]:
        return {"kernels": [SimpleNamespace(name=name, duration=us)]}

    events = [
        event("gradients", 0, 10, 1),
        event("update", 10, 20, 1),
        event("aten::mm", 1, 2, 1, **launch("nvjet_a", 5.0)),
        event("aten::mm", 3, 4, 2, **launch("nvjet_a", 7.0)),
        event("aten::add_", 12, 13, 1, **launch("multi_tensor_apply", 3.0)),
        event("nvjet_a", 0, 12.5, 0, device_type=DEVICES.CUDA),
        event("lost", 0, 4, 0, device_type=DEVICES.CUDA),
        event("gradients", 0, 99, 0, device_type=DEVICES.CUDA, is_user_annotation=True),
    ]
    found = kernels_of(events, is_cuda=True)
    assert found == [
        Kernel("forward", "nvjet_a", 5.0),
        Kernel("backward", "nvjet_a", 7.0),
        Kernel("update", "multi_tensor_apply", 3.0),
        Kernel("unlinked", "lost", 4.0),
    ]
    assert "sum" in format_profile(found, 1)


def test_idle_is_what_no_kernel_covers() -> None:
    on_gpu = {"device_type": DEVICES.CUDA}
    events = [
        event("c", 30, 40, 0, **on_gpu),
        event("a", 0, 20, 0, **on_gpu),
        event("b", 5, 10, 0, **on_gpu),
        event("d", 41, 42, 0, **on_gpu),
        event("aten::mm", 50, 60, 1),
    ]
    gaps = idle_times(events)
    assert gaps == [(pytest.approx(0.010), "a", "c"), (pytest.approx(0.001), "c", "d")]
    assert "idle 0.01 ms of a step" in format_idle(gaps, 1)
    assert idle_times([]) == []


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("triton_tem_fused_flex_attention_backward_1", "attention"),
        ("_write_back_bwd_kernel", "hyper-connections"),
        ("_seam_bwd_kernel", "hyper-connections"),
        ("_head_kernel", "hyper-connections"),
        ("_single_pass_fwd_kernel", "hyper-connections"),
        ("_engram_gate_fwd_kernel", "Engram"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matrix products"),
        ("triton_poi_fused_cat_mul_silu_3", "norms, rope, gates, sums (fused)"),
        ("Memcpy DtoD (Device -> Device)", "copies and fills"),
        ("multi_tensor_apply_kernel", "other"),
    ],
)
def test_kernels_are_grouped_by_their_names(kernel: str, group: str) -> None:
    assert group_of_kernel(kernel) == group
