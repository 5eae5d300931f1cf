"""Multi-token prediction: what it reads, what it must not change, what learns from it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_near
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.nn.model import Model
from tests.nn.helpers import build, compression

LENGTH = 60


def config(*, streams: bool = True) -> ModelConfig:
    base = dataclasses.replace(presets.tiny_v32(), moe=None)
    return base if streams else dataclasses.replace(base, mhc=None)


def tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def ahead(model: Model, ids: Tensor) -> Tensor:
    model.train()
    with torch.no_grad():
        return model.forward_hidden(ids)[1]["mtp_hidden"]


def test_it_runs_in_training_only_and_never_changes_the_logits() -> None:
    model = build(config())
    without = Model(
        dataclasses.replace(config(), num_nextn_predict_layers=0),
        compression_table=compression(config()),
    ).eval()
    _, unexpected = without.load_state_dict(model.state_dict(), strict=False)
    assert unexpected
    assert all(name.startswith("mtp.") for name in unexpected)
    with torch.inference_mode():
        hidden, aux = model.forward_hidden(tokens())
        want, _ = without.forward_hidden(tokens())
        assert aux == {}
        assert torch.equal(hidden, want)
        hidden, aux = model.train().forward_hidden(tokens())
        assert set(aux) == {"mtp_hidden"}
        assert torch.equal(hidden, want)


@pytest.mark.parametrize("streams", [False, True])
def test_with_a_neutral_block_it_is_the_joined_projection(streams: bool) -> None:
    """h'_i = W [norm(h_i), norm(embed(x_{i+1}))], each norm with weights of its own."""
    model = build(config(streams=streams)).train()
    mtp, ids = model.mtp, tokens()
    assert mtp is not None
    with torch.no_grad():
        mtp.block.attn.wo_b.weight.zero_()
        mtp.block.ffn.w2.weight.zero_()
        for name, parameter in mtp.named_parameters():
            if "mhc" in name or name.startswith("head."):
                parameter.zero_()
        hidden, aux = model.forward_hidden(ids)
        embedding = model.embed.weight[ids[:, 1:]]
        parts = [
            F.rms_norm(x, (64,), w, 1e-6)
            for x, w in (
                (hidden[:, :-1], mtp.hidden_norm.weight),
                (embedding, mtp.embed_norm.weight),
            )
        ]
        joined = torch.cat(parts, dim=-1) @ mtp.proj.weight.T
        want = F.rms_norm(joined, (64,), mtp.norm.weight, 1e-6)
    assert_near(aux["mtp_hidden"][:, :-1], want, 1e-4)


def test_position_i_reads_tokens_up_to_the_next_one_and_no_further() -> None:
    model = build(config())
    ids = tokens(1)
    want = ahead(model, ids)[0]
    for position in (5, 45):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 9) % 256
        got = ahead(model, changed)[0]
        assert torch.equal(got[: position - 1], want[: position - 1])
        assert not torch.equal(got[position - 1], want[position - 1])  # as the next token
        assert not torch.equal(got[position], want[position])


def test_rows_of_a_batch_do_not_meet() -> None:
    """Except in the last column, which has no next token and no target."""
    model = build(config())
    ids = tokens(2)
    want = ahead(model, ids)
    changed = ids.clone()
    changed[1] = (changed[1] + 5) % 256
    got = ahead(model, changed)
    assert torch.equal(got[0, :-1], want[0, :-1])


def test_its_gradient_reaches_its_own_weights_the_backbone_and_the_shared_head() -> None:
    model = build(config()).train()
    hidden, aux = model.forward_hidden(tokens())
    logits = aux["mtp_hidden"] @ model.output_weight.T
    F.cross_entropy(logits[:, :-2].flatten(0, 1), tokens()[:, 2:].flatten()).backward()
    assert model.mtp is not None
    assert model.head is not None
    own = dict(model.mtp.named_parameters())
    shared = {
        "head": model.head.weight,
        "embedding": model.embed.weight,
        "first layer": model.layers[0].attn.wkv.weight,
    }
    for name, parameter in {**own, **shared}.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert hidden.requires_grad


def test_it_learns_to_predict_the_token_after_the_next() -> None:
    """On rows that count upwards the answer is known from either input."""
    model = build(config(), noise=0.02).train()
    start = torch.randint(0, 256, (8, 1), generator=torch.Generator().manual_seed(0))
    ids = (start + torch.arange(10)) % 256
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        _, aux = model.forward_hidden(ids)
        logits = aux["mtp_hidden"][:, :-2] @ model.output_weight.T
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
