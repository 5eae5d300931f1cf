"""Hyper-connections weighed one sublayer ahead: the equation written out, the start, the files.

That prefill, decoding and the full forward agree is checked in `test_equivalence`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_near
from torch import Tensor

from model1 import presets
from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.nn.block import Block
from model1.nn.context import FullContext
from model1.nn.engram import ngram_windows
from model1.nn.mhc import HyperConnection
from model1.nn.model import Model
from model1.nn.single_pass import SinglePassBlock
from model1.tokenizer import train_tokenizer
from model1.weights import load_model, save_checkpoint
from tests.nn.helpers import build
from tests.nn.test_equivalence import everything


def in_one_pass(config: ModelConfig) -> ModelConfig:
    assert config.mhc is not None
    return dataclasses.replace(config, mhc=dataclasses.replace(config.mhc, single_pass=True))


CONFIGS = {
    "everything": in_one_pass(everything()),
    "without memory": in_one_pass(dataclasses.replace(presets.tiny(), engram=None)),
    "with a block ahead": in_one_pass(dataclasses.replace(presets.tiny_v32(), moe=None)),
}


def tokens(rows: int = 2, length: int = 60) -> Tensor:
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(3))


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def by_the_equation(model: Model, ids: Tensor) -> Tensor:
    """Hidden states [b, s, c]: every sublayer's A, B, C of its streams, A used one later."""
    config = model.config
    context = FullContext(config, torch.zeros_like(ids), torch.float32, dense=False)
    flat = ids.flatten()
    size = 1 if config.engram is None else config.engram.engram_max_ngram_size
    ngrams = ngram_windows(flat, context.positions, size)
    x = model.embed.weight[flat][:, None].repeat(1, config.num_streams, 1)
    a = torch.eye(config.num_streams)[:1].expand(len(x), -1)  # stream 0
    for layer in model.layers:
        assert isinstance(layer, Block)
        if layer.engram is not None:
            x = layer.engram(x, layer.engram.rows(ngrams, model.compression_table), context)
        for is_ffn in (False, True):
            connection = layer.mhc_ffn if is_ffn else layer.mhc_attn
            its_norm = layer.ffn_norm if is_ffn else layer.attn_norm
            assert connection is not None
            u = norm(torch.einsum("tn,tnc->tc", a, x), its_norm.weight, its_norm.eps)
            if is_ffn:
                y = layer.ffn(u)
            else:
                q, kv, gate = layer.attn.project(layer.layer_id, u, context)
                out = context.attend(layer.layer_id, q, kv, layer.attn.spec)
                y = layer.attn.finish(out, gate, context)
            a, c, b = connection.coefficients(x)
            x = torch.einsum("tjk,tjc->tkc", b, x) + torch.einsum("tk,tc->tkc", c, y)
    exit_norm = model.norm
    u = norm(torch.einsum("tn,tnc->tc", a, x), exit_norm.weight, exit_norm.eps)
    return u.unflatten(0, ids.shape)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_the_equation_with_its_gradients(name: str) -> None:
    model, ids = build(CONFIGS[name]), tokens()
    got, _ = model.forward_hidden(ids)
    want = by_the_equation(model, ids)
    assert_near(got, want, 1e-4)
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(("mtp", "head"))
    }
    torch.manual_seed(1)
    grad = torch.randn(got.shape)
    grads = (
        torch.autograd.grad(hidden, list(parameters.values()), grad, allow_unused=True)
        for hidden in (got, want)
    )
    for parameter, a, b in zip(parameters, *grads, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None and b is not None:
            assert (a - b).abs().max() <= 1e-3 * b.abs().max() + 1e-6, parameter


def test_it_differs_from_the_standard_form_and_has_no_head() -> None:
    config = CONFIGS["without memory"]
    assert config.mhc is not None
    standard = build(
        dataclasses.replace(config, mhc=dataclasses.replace(config.mhc, single_pass=False))
    )
    model = Model(config).eval()
    missing, unexpected = model.load_state_dict(standard.state_dict(), strict=False)
    assert missing == []
    assert set(unexpected) == {"mhc_head.fn", "mhc_head.scale", "mhc_head.base"}
    with torch.inference_mode():
        assert (model(tokens()) - standard(tokens())).abs().max() > 1e-2
    assert all(isinstance(layer, SinglePassBlock) for layer in model.layers)
    assert not any(isinstance(layer, SinglePassBlock) for layer in standard.layers)


def test_identical_streams_act_as_the_plain_residual_at_the_start() -> None:
    config = CONFIGS["without memory"]
    base = build(dataclasses.replace(config, mhc=None))
    model = Model(config).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if "mhc" in name and name.endswith("scale"):
                parameter.zero_()
        assert_near(model(tokens()), base(tokens()), 2e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_of_a_connection_learns(name: str) -> None:
    """The last one's `pre` too, which weighs the exit."""
    model = build(CONFIGS[name]).train()
    hidden, aux = model.forward_hidden(tokens())
    (hidden.sum() + aux.get("mtp_hidden", hidden).square().sum()).backward()
    connections = [m for m in model.modules() if isinstance(m, HyperConnection)]
    assert connections
    for parameter in (p for c in connections for p in c.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    n = model.config.num_streams
    assert all(c.base.grad is not None and c.base.grad[:n].any() for c in connections)


def test_a_block_ahead_reads_as_the_standard_form_where_it_is_neutral() -> None:
    """h'_i = W [norm(h_i), norm(embed(x_{i+1}))], each norm with weights of its own."""
    model, ids = build(CONFIGS["with a block ahead"]).train(), tokens()
    mtp = model.mtp
    assert mtp is not None
    assert mtp.head is None
    with torch.no_grad():
        mtp.block.attn.wo_b.weight.zero_()
        mtp.block.ffn.w2.weight.zero_()
        for name, parameter in mtp.named_parameters():
            if "mhc" in name:
                parameter.zero_()
        hidden, aux = model.forward_hidden(ids)
        following = model.embed.weight[ids[:, 1:]]
        joined = [
            F.rms_norm(x, (64,), w, 1e-6)
            for x, w in (
                (hidden[:, :-1], mtp.hidden_norm.weight),
                (following, mtp.embed_norm.weight),
            )
        ]
        want = F.rms_norm(torch.cat(joined, -1) @ mtp.proj.weight.T, (64,), mtp.norm.weight, 1e-6)
    assert_near(aux["mtp_hidden"][:, :-1], want, 1e-4)


def test_tokens_do_not_see_what_follows() -> None:
    model, ids = build(CONFIGS["everything"]), tokens(1)
    with torch.inference_mode():
        want = model(ids)
        for position in (5, 45):
            changed = ids.clone()
            changed[0, position] = (changed[0, position] + 9) % 256
            got = model(changed)
            assert torch.equal(got[0, :position], want[0, :position])
            assert not torch.equal(got[0, position], want[0, position])


def test_diagnostics_report_the_worst_connection() -> None:
    assert 0 < build(CONFIGS["without memory"]).diagnostics(tokens())["sinkhorn_error"] < 2e-2


# --- files -------------------------------------------------------------------------------


def test_the_option_is_written_and_read_and_off_where_it_is_not() -> None:
    config = CONFIGS["everything"]
    data = config.to_dict()
    assert data["mhc"]["single_pass"] is True
    assert ModelConfig.from_dict(data) == config
    del data["mhc"]["single_pass"]
    read = ModelConfig.from_dict(data)
    assert read.mhc is not None
    assert not read.mhc.single_pass
    data["mhc"]["single_pass"] = "yes"
    with pytest.raises(ConfigError, match=r"mhc\.single_pass"):
        ModelConfig.from_dict(data)


def test_a_checkpoint_computes_what_the_model_did(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(
        ["The quick brown fox jumps over the lazy dog. "] * 4, vocab_size=290
    )
    table = tokenizer.compression_table()
    sizes = {"vocab_size": tokenizer.vocab_size, "compressed_vocab_size": int(table.max()) + 1}
    torch.manual_seed(1)
    model = Model(in_one_pass(presets.tiny(**sizes)), compression_table=table).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    how = {"weight_format": "fp32", "table_format": "fp32"}
    provenance = {
        "sources": ["a"],
        "licences": {"a": "CC0-1.0"},
        "command": "-",
        "commit": "0" * 40,
    }
    save_checkpoint(
        tmp_path / "c", model.state_dict(), model.config,
        tokenizer=tokenizer, provenance=provenance, **how,
    )  # fmt: skip
    again, _ = load_model(tmp_path / "c")
    assert again.config == model.config
    with torch.inference_mode():
        # rows stored in fp32 are looked up in bf16
        assert_near(again(tokens()), model(tokens()), 2e-2)
