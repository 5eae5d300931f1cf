from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model1.errors import ConfigError
from model1.train.checkpoint import model_tensors
from model1.train.config import TrainConfig
from model1.train.log import read_log
from model1.train.loop import Trainer
from model1.train.selector import fit_principal

Make = Callable[..., TrainConfig]
SHORT = ("schedule.max_steps=1", "data.batch_rows=2", "log.every_steps=1")


def test_a_run_ends_with_fitted_selectors_and_no_other_change(make_config: Make) -> None:
    plain = Trainer(make_config(*SHORT, "model.dense_attention=true", out="plain"), quiet=True)
    plain.run()
    section = "selector={steps=6, lr=5e-3, rows=32}"
    config = make_config(*SHORT, "model.dense_attention=true", section, out="fitted")
    fitted = Trainer(config, quiet=True)
    fitted.run()
    expected = model_tensors(plain.model)
    for name, tensor in model_tensors(fitted.model).items():
        if "selector" not in name:
            assert torch.equal(tensor, expected[name]), name
        elif name.endswith("basis"):
            assert not torch.equal(tensor, expected[name]), name
            gram = tensor @ tensor.T
            torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0, atol=1e-5)
    records = read_log(Path(config.out_dir) / "log.jsonl")
    (losses,) = [r["selector_losses"] for r in records if "selector_losses" in r]
    assert len(losses) == 6
    assert min(losses[1:]) < losses[0]


def test_a_dense_model_has_nothing_to_fit(make_config: Make) -> None:
    trainer = Trainer(make_config(*SHORT, 'model.switch_off=["sparse"]'), quiet=True)
    with pytest.raises(ConfigError, match="there is no selector to fit"):
        fit_principal(trainer.model, [])  # type: ignore[arg-type]
