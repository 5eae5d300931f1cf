"""One step: halves of a batch give its gradient, and a GPU's compiled step is that of the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from model1.tokenizer import Tokenizer
from model1.train.config import TrainConfig, load_train_config
from model1.train.data import Batch
from model1.train.models import build_model
from model1.train.step import TrainStep

CONFIG = Path(__file__).parents[2] / "configs" / "tiny.toml"
PLAIN = {"kind": "plain", "num_parameters": 1_000_000, "preset": None, "attention": "flex"}


def make(config: TrainConfig) -> TrainStep:
    tokenizer = Tokenizer.from_dir(config.data.tokenizer)
    device = torch.device(config.device)
    return TrainStep(build_model(config, tokenizer).to(device), config, device)


def config_of(tokenizer_dir: Path, *overrides: str) -> TrainConfig:
    return load_train_config(CONFIG, [f'data.tokenizer="{tokenizer_dir}"', *overrides])


def packed(seq_len: int) -> Batch:
    """Four rows, the second of two documents, the last tokens of the third not to be learned."""
    ids = torch.randint(300, (4, seq_len + 1), generator=torch.Generator().manual_seed(3))
    starts = torch.zeros(4, seq_len, dtype=torch.int64)
    starts[1, seq_len // 3 :] = seq_len // 3
    targets = ids[:, 1:].clone()
    targets[2, -5:] = -100
    return Batch(ids[:, :-1].contiguous(), targets, starts)


def test_micro_batches_add_up_to_the_gradient_of_the_batch(tokenizer_dir: Path) -> None:
    found = []
    for rows in (4, 1):
        step = make(config_of(tokenizer_dir, f"data.micro_batch_rows={rows}"))
        terms = step.gradients(packed(40))
        grads = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
        found.append((terms["loss"], grads))
    (loss, grads), (parts_loss, parts) = found
    torch.testing.assert_close(parts_loss, loss)
    for name, grad in grads.items():
        part, whole = (g.to_dense() if g.is_sparse else g for g in (parts[name], grad))
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-5, msg=name)


def test_an_update_drops_the_gradients_and_gives_their_norm(tokenizer_dir: Path) -> None:
    step = make(config_of(tokenizer_dir))
    before = step.model.output_weight.detach().clone()  # type: ignore[union-attr, operator]
    step.gradients(packed(40))
    squares = [p.grad.double().square().sum() for p in step.optimizer.clipped if p.grad is not None]
    norm = step.update(1.0)
    torch.testing.assert_close(norm.double(), torch.stack(squares).sum().sqrt(), rtol=1e-5, atol=0)
    assert all(p.grad is None for p in step.model.parameters())
    assert not torch.equal(step.model.output_weight, before)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model1", "plain"])
def test_a_compiled_step_on_a_gpu_has_the_loss_and_gradients_of_a_cpu(
    kind: str, tokenizer_dir: Path
) -> None:
    config = config_of(tokenizer_dir, "model.dense_attention=true", "data.seq_len=256")
    if kind == "plain":
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, **PLAIN))
    on_gpu = dataclasses.replace(config, device="cuda", precision="bf16", compile="blocks")
    cpu_model = dataclasses.replace(config.model, attention="sdpa")
    exact, fast = make(dataclasses.replace(config, model=cpu_model)), make(on_gpu)
    with torch.no_grad():  # away from the zero start of outputs, through which nothing flows back
        for p, q in zip(exact.model.parameters(), fast.model.parameters(), strict=True):
            p.add_(torch.randn_like(p) * 0.02)
            q.copy_(p)
    batch = packed(256)
    want, got = exact.gradients(batch)["loss"], fast.gradients(batch)["loss"]
    assert got.item() == pytest.approx(want.item(), rel=1e-2)
    flat = [
        torch.cat([p.grad.flatten().cpu() for p in step.optimizer.clipped if p.grad is not None])
        for step in (exact, fast)
    ]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    assert fast.update(1.0).item() == pytest.approx(exact.update(1.0).item(), rel=0.05)
