from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from model1 import presets
from model1.nn.engram import EngramTable
from model1.nn.model import Model
from model1.train.config import OptimSection
from model1.train.optim import Adam, Muon, Optimizer, RowAdam, group_of, newton_schulz

SETTINGS = OptimSection(muon_lr=0.02, embed_lr=3e-3, scalar_lr=3e-3, table_lr=1.5e-2)


def tiny_model(name: str = "tiny") -> Model:
    config = getattr(presets, name)(vocab_size=256, compressed_vocab_size=200)
    return Model(config, compression_table=np.arange(256) % 200)


def named(**tensors: torch.Tensor) -> list[tuple[str, nn.Parameter]]:
    return [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]


@pytest.mark.parametrize(
    ("name", "shape", "group"),
    [
        ("embed.weight", (8, 4), "embed"),
        ("head.weight", (8, 4), "embed"),
        ("layers.0.attn.wq_a.weight", (8, 4), "muon"),
        ("layers.0.attn.wo_a", (2, 8, 4), "muon"),
        ("layers.0.attn.attn_sink", (4,), "scalar"),
        ("layers.0.attn.gate.proj.weight", (4, 8), "muon"),
        ("layers.0.attn.selector.basis", (4, 8), "scalar"),
        ("layers.0.attn_norm.weight", (8,), "scalar"),
        ("layers.0.mhc_attn.fn", (24, 32), "muon"),
        ("layers.0.mhc_attn.scale", (3,), "mixing"),
        ("layers.0.mhc_ffn.base", (24,), "mixing"),
        ("mhc_head.fn", (4, 32), "muon"),
        ("mtp.head.fn", (4, 32), "muon"),
        ("layers.1.engram.table.weight", (100, 8), "table"),
        ("layers.1.engram.wkv.weight", (40, 16), "muon"),
        ("layers.1.engram.norm_weight", (4, 8), "scalar"),
        ("layers.1.engram.conv_weight", (32, 4), "scalar"),
        ("layers.1.ffn.gate.weight", (4, 8), "muon"),
        ("layers.1.ffn.gate_up", (4, 16, 8), "muon"),
        ("layers.0.gate_proj.weight", (16, 8), "muon"),
    ],
)
def test_each_parameter_has_its_group(name: str, shape: tuple[int, ...], group: str) -> None:
    assert group_of(name, torch.zeros(shape)) == group


@pytest.mark.parametrize("preset", ["tiny", "tiny_v32"])
def test_no_matrix_of_the_model_is_overlooked(preset: str) -> None:
    optimizer = Optimizer(tiny_model(preset), SETTINGS)
    assert all(optimizer.groups.values())
    words = ("norm", "conv", "basis")
    for name, parameter in optimizer.groups["scalar"]:
        assert parameter.ndim < 2 or any(word in name for word in words), name


@pytest.mark.parametrize("shape", [(2, 16, 16), (3, 8, 24), (1, 40, 5)])
def test_newton_schulz_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    result = newton_schulz(x)
    values = torch.linalg.svdvals(result)
    # Rows of a square random matrix may be nearly dependent: their smallest value rises slowly.
    assert values.max() < 1.3
    assert values.median() > 0.6
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    similarity = torch.cosine_similarity(result.flatten(1), (u @ vt).flatten(1))
    assert similarity.min() > 0.9
    assert newton_schulz(torch.zeros(shape)).abs().max() == 0


def test_muon_treats_a_stack_as_its_matrices() -> None:
    values, grads = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    stacked = named(w=values.clone())
    alone = named(**{f"w{i}": values[i].clone() for i in range(3)})
    for pairs in (stacked, alone):
        for i, (_, p) in enumerate(pairs):
            p.grad = (grads if p.ndim == 3 else grads[i]).clone()
        Muon(pairs, momentum=0.9, weight_decay=0.1).step(0.1)
    joined = torch.stack([p.detach() for _, p in alone])
    torch.testing.assert_close(stacked[0][1].detach(), joined)
    # Tall matrices take sqrt(rows / cols) larger steps; every singular value moves by about lr.
    moved = torch.linalg.svdvals(values * (1 - 0.01) - joined) / (0.1 * 1.5**0.5)
    assert moved.min() > 0.5
    assert moved.max() < 1.3


def test_table_rows_without_gradient_keep_every_bit() -> None:
    pairs = named(table=torch.randn(50, 4))
    table = pairs[0][1]
    optimizer = RowAdam(pairs, 0.9, 0.99)
    before = table.detach().clone()
    for rows in ([3, 7], [7, 20]):
        grad = torch.zeros(50, 4)
        grad[rows] = torch.randn(len(rows), 4)
        table.grad = grad
        optimizer.step(0.1)
    touched = torch.zeros(50, dtype=torch.bool)
    touched[[3, 7, 20]] = True
    assert torch.equal(table.detach()[~touched], before[~touched])
    assert all((m[~touched] == 0).all() for m in optimizer.moments[0])
    assert (table.detach()[touched] != before[touched]).all()
    assert optimizer.moments[0][2][[3, 7, 20], 0].tolist() == [1, 2, 1]


def test_a_row_read_every_step_follows_adam() -> None:
    start, grads = torch.randn(2, 4), torch.randn(5, 2, 4)
    rows, plain = named(w=start.clone()), named(w=start.clone())
    by_row, adam = RowAdam(rows, 0.9, 0.95), Adam(plain, 0.9, 0.95)
    for grad in grads:
        for pairs, optimizer in ((rows, by_row), (plain, adam)):
            pairs[0][1].grad = grad.clone()
            optimizer.step(0.01)
    torch.testing.assert_close(rows[0][1].detach(), plain[0][1].detach())


def test_a_models_tables_train_alike_on_sparse_and_dense_gradients() -> None:
    ids = torch.randint(0, 256, (2, 24))
    tables = []
    for is_sparse in (True, False):
        torch.manual_seed(1)
        model = tiny_model()
        optimizer = Optimizer(model, SETTINGS)
        (_, table), *_ = optimizer.groups["table"]
        for module in model.modules():
            if isinstance(module, EngramTable):
                module.has_sparse_gradient = is_sparse
        for _ in range(2):
            for part in ids:  # gradients of two micro-batches add up
                model(part[None]).square().mean().backward()
            assert table.grad is not None
            assert (table.grad.layout == torch.sparse_coo) == is_sparse
            optimizer.clip()
            optimizer.step(1.0)
        tables.append(table.detach())
    torch.testing.assert_close(tables[0], tables[1], rtol=1e-4, atol=1e-6)


def test_clipping_leaves_tables_alone() -> None:
    model = tiny_model()
    optimizer = Optimizer(model, SETTINGS)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    count = sum(p.numel() for p in optimizer.clipped)
    assert float(optimizer.clip()) == pytest.approx(count**0.5, rel=1e-5)
    (name, table), *_ = optimizer.groups["table"]
    assert table.grad is not None
    assert (table.grad == 1).all(), name
    total = sum(float(p.grad.square().sum()) for p in optimizer.clipped if p.grad is not None)
    assert total == pytest.approx(1.0, rel=1e-3)


def test_state_is_every_tensor_and_writing_it_restores() -> None:
    model = tiny_model()
    one, two = Optimizer(model, SETTINGS), Optimizer(model, SETTINGS)
    for parameter in one.parameters:
        parameter.grad = torch.randn_like(parameter)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    one.step(1.0)
    for name, tensor in one.state().items():
        two.state()[name].copy_(tensor)
    grads = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    results = []
    for optimizer in (one, two):
        for name, parameter in model.named_parameters():
            parameter.data.copy_(start[name])
            parameter.grad = grads[name].clone() if parameter.requires_grad else None
        optimizer.step(1.0)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
