from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model1.errors import CheckpointError, ConfigError, DeviceError, Model1Error
from model1.train.__main__ import main
from model1.train.checkpoint import Progress, list_checkpoints, model_tensors
from model1.train.config import TrainConfig
from model1.train.log import read_log
from model1.train.loop import Trainer
from model1.train.models import load_trained
from model1.weights import load_tensors

Make = Callable[..., TrainConfig]
SHORT = ("schedule.max_steps=6", "data.seq_len=32", "data.batch_rows=2", "log.every_steps=1")
PLAIN = ("model.kind=plain",)


def run(config: TrainConfig, *, resume: bool = False) -> Trainer:
    trainer = Trainer(config, resume=resume, quiet=True)
    trainer.run()
    return trainer


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**model_tensors(trainer.model), **trainer.optimizer.state()}


def test_loss_falls_in_twenty_steps(make_config: Make, text_dir: Path) -> None:
    config = make_config(f'data.valid=["{text_dir}"]', "data.valid_rows=2")
    trainer = run(config)
    records = read_log(Path(config.out_dir) / "log.jsonl")
    losses = [r["cross_entropy"] for r in records if "cross_entropy" in r]
    assert losses[-1] < losses[0] - 1.5
    last = [r for r in records if "grad_norm" in r][-1]
    assert last["tokens"] == 20 * 4 * 64
    assert {"step", "loss", "lr", "tokens_per_second", "sinkhorn_error"} <= set(last)
    assert last["sinkhorn_error"] < 0.05
    assert 0 < records[-1]["valid_bits_per_byte"] < 8
    out = Path(config.out_dir)
    loaded = load_trained(out / "final", trainer.tokenizer)
    for name, tensor in model_tensors(loaded).items():
        assert torch.equal(tensor, model_tensors(trainer.model)[name])
    assert trainer.progress == Progress(
        step=20, rows=80, tokens=5120, seconds=trainer.progress.seconds
    )


@pytest.mark.parametrize("kind", [("model.preset=tiny",), PLAIN], ids=["model1", "plain"])
def test_a_resumed_run_ends_in_the_same_bits(make_config: Make, kind: tuple[str, ...]) -> None:
    straight = run(make_config(*SHORT, *kind, out="straight"))
    config = make_config(*SHORT, *kind, "log.checkpoint_every_steps=3", out="halves")
    first = Trainer(config, quiet=True)
    for _ in range(3):  # a run that dies right after its first checkpoint
        first.step(1.0 if first.progress.step else 0.5)
        first.progress = Progress(step=first.progress.step + 1, rows=2 * first.progress.step + 2)
    first._save()
    resumed = run(config, resume=True)
    expected = tensors(straight)
    found = tensors(resumed)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    logged = read_log(Path(config.out_dir) / "log.jsonl")
    reference = read_log(Path(straight.config.out_dir) / "log.jsonl")
    assert [r["loss"] for r in logged if "loss" in r] == [
        r["loss"] for r in reference if r.get("step", 0) > 3 and "loss" in r
    ]


def test_a_sitting_ends_early_and_the_next_goes_on(make_config: Make) -> None:
    config = make_config(*SHORT, *PLAIN)
    sitting = Trainer(config, quiet=True)
    progress = sitting.run(stop_after_seconds=1e-9)
    assert progress.step == 0
    assert not (Path(config.out_dir) / "final").exists()
    assert run(config, resume=True).progress.step == 6


def test_seconds_end_a_run(make_config: Make) -> None:
    config = make_config(*SHORT, *PLAIN, "schedule.max_seconds=1e-6")
    assert run(config).progress.step == 1


def test_only_the_last_checkpoints_stay(make_config: Make) -> None:
    config = make_config(*SHORT, *PLAIN, "log.checkpoint_every_steps=1", "log.keep_last=2")
    run(config)
    names = [path.name for path in list_checkpoints(Path(config.out_dir))]
    assert names == ["step_00000005", "step_00000006"]


def test_micro_batches_do_not_change_the_step(make_config: Make) -> None:
    size = ("data.seq_len=32", "schedule.max_steps=1", *PLAIN)
    whole = run(make_config(*size, "data.micro_batch_rows=4", out="a"))
    parts = run(make_config(*size, "data.micro_batch_rows=1", out="b"))
    for name, tensor in model_tensors(whole.model).items():
        torch.testing.assert_close(
            model_tensors(parts.model)[name], tensor, rtol=1e-4, atol=1e-4, msg=name
        )


def test_a_run_starts_from_a_checkpoint_with_chat_rows(make_config: Make, text_dir: Path) -> None:
    base = run(make_config(*SHORT, out="base"))
    folder = Path(base.config.out_dir) / "final"
    overrides = (f'model={{kind="model1", init_from="{folder}"}}', f'data.chat=["{text_dir}"]')
    data = ("data.chat_share=0.5", "data.seq_len=192", "schedule.max_steps=2")
    tuned = Trainer(make_config(*SHORT, *overrides, *data, out="chat"), quiet=True)
    for name, tensor in model_tensors(base.model).items():
        assert torch.equal(model_tensors(tuned.model)[name], tensor)
    assert tuned.run().step == 2


def test_parts_can_be_switched_off(make_config: Make) -> None:
    config = make_config(*SHORT, 'model.switch_off=["engram", "mhc"]', "schedule.max_steps=1")
    trainer = run(config)
    assert trainer.model.config.engram is None  # type: ignore[union-attr]
    assert not any("mhc" in name for name in model_tensors(trainer.model))


def test_streams_may_be_weighed_one_sublayer_ahead(make_config: Make) -> None:
    trainer = run(make_config(*SHORT, "model.single_pass=true", "schedule.max_steps=1"))
    assert trainer.model.config.mhc.single_pass  # type: ignore[union-attr]
    assert "mhc_head.fn" not in model_tensors(trainer.model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to find")
def test_a_gpu_that_is_absent_is_an_error(make_config: Make) -> None:
    with pytest.raises(DeviceError, match="absent"):
        Trainer(make_config("device=cuda"), quiet=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.preset=huge", "must name a function of model1.presets, got 'huge'"),
        ('model.switch_off=["attention"]', "switch_off must name one of .* got 'attention'"),
        ('model={kind="model1", init_from="absent"}', "absent"),
        ("loss.mtp_weight=0.3", "loss.mtp_weight needs a model with an MTP head, got 0.3"),
        ('data.train=["absent"]', "absent"),
    ],
)
def test_a_wrong_run_is_named_and_leaves_no_files(
    make_config: Make, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(Model1Error, match=message):
        Trainer(make_config(override), quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_neither_overwritten_nor_invented(make_config: Make) -> None:
    config = make_config(*SHORT, *PLAIN)
    with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
        Trainer(config, resume=True, quiet=True)
    run(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        Trainer(config, quiet=True)


def test_altered_checkpoints_are_refused(make_config: Make) -> None:
    config = make_config(*SHORT, *PLAIN)
    run(config)
    folder = list_checkpoints(Path(config.out_dir))[-1]
    assert load_tensors(folder / "model.safetensors")
    path = folder / "optimizer.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        Trainer(config, resume=True, quiet=True)


def test_the_module_runs_from_the_command_line(
    make_config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "absent.toml")]) == 1
    assert "error: cannot read config" in capsys.readouterr().err


def test_position_parts_can_be_switched_off_and_stretched(make_config: Make) -> None:
    base = run(make_config(*SHORT, 'model.switch_off=["vvpa"]', "schedule.max_steps=1", out="base"))
    vvpa = base.model.config.vvpa  # type: ignore[union-attr]
    parts = (vvpa.rotary_value, vvpa.output_gate, vvpa.log_temperature, vvpa.yarn)  # type: ignore[union-attr]
    assert not any(parts)
    folder = Path(base.config.out_dir) / "final"
    section = (
        f'model={{kind="model1", init_from="{folder}", yarn_factor=4.0, yarn_original_length=32}}'
    )
    stretched = Trainer(make_config(*SHORT, section, out="long"), quiet=True).model
    assert stretched.config.vvpa.yarn.factor == 4.0  # type: ignore[union-attr]
    for name, tensor in model_tensors(base.model).items():
        assert torch.equal(model_tensors(stretched)[name], tensor)
