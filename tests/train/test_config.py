from __future__ import annotations

from pathlib import Path

import pytest

from model1.errors import ConfigError
from model1.train.config import load_train_config

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda p: p.name)
def test_every_shipped_config_is_valid(path: Path) -> None:
    config = load_train_config(path)
    assert config.out_dir == f"runs/{path.stem}"


def test_an_override_replaces_one_value() -> None:
    config = load_train_config(
        CONFIGS / "tiny.toml",
        ["schedule.max_seconds=90", "out_dir=runs/other", 'model.switch_off=["engram"]'],
    )
    assert config.schedule.max_seconds == 90.0
    assert config.out_dir == "runs/other"
    assert config.model.switch_off == ("engram",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.muon_rl=1", "unknown config key optim.muon_rl"),
        ("seed=true", "seed must be int, got True"),
        ("device=tpu", "device must be one of"),
        ("optim.clip_norm=0", "clip_norm must be positive, got 0"),
        ("data.micro_batch_rows=3", "micro_batch_rows must divide batch_rows 4, got 3"),
        ("data.chat_share=0.5", "chat_share must be positive exactly when chat has sources"),
        ("data.train=[]", "data.train must name at least one source"),
        ("model.num_parameters=1000", "exactly one of preset, num_parameters and init_from"),
        ("schedule.decay_fraction=1.5", "decay_fraction must be in"),
        ("schedule.max_seconds=-1", "max_seconds must be positive"),
        (
            'model={kind="model1", preset="tiny", switch_off=["mhc"], single_pass=true}',
            r"single_pass needs .*, got kind 'model1', preset 'tiny', switch_off \['mhc'\]",
        ),
        ("log.every_steps=0", "every_steps must be positive, got 0"),
        ("seed", "an override must look like"),
        ("seed.x=1", "is not a section"),
    ],
)
def test_a_wrong_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_train_config(CONFIGS / "tiny.toml", [override])


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read config .*absent\.toml"):
        load_train_config(tmp_path / "absent.toml")
    (tmp_path / "bad.toml").write_text("seed = = 1")
    with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
        load_train_config(tmp_path / "bad.toml")
