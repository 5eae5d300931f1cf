"""The models of the training benchmark: Model1, the same with parts off, and plain transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.baseline import PlainConfig, PlainTransformer
from model1.train.config import TrainConfig
from model1.train.models import build_model, preset_config
from model1.train.optim import group_of

# What a configuration leaves out of the preset. Its latent attention, the sinks included, is what
# "bare" and "plain" differ in.
SWITCHED_OFF: dict[str, tuple[str, ...]] = {
    "all": (),
    "no-engram": ("engram",),
    "no-mhc": ("mhc",),
    "no-sparse": ("sparse",),
    "no-vvpa": ("vvpa",),
    "bare": ("engram", "mhc", "sparse", "vvpa"),
}
# As many parameters as "all" without its Engram rows, which are memory and no arithmetic; and
# with them, as configs/plain_small.toml counts. The first is the faster, and the one to be near.
PLAIN = "plain"
PLAIN_WITH_ROWS = "plain-with-rows"
NAMES = (*SWITCHED_OFF, PLAIN, PLAIN_WITH_ROWS)
_FFN_STEP = 64  # feed-forward widths are multiples of it: others would slow matrix products down


class Size(NamedTuple):
    """Parameters of a model, and how many score and value channels its attention has."""

    total: int
    rows: int  # of the total, Engram rows
    products: int  # of the total, weights that every token is multiplied with
    channels: int  # layers * heads * (key width + value width)


def build(name: str, config: TrainConfig, tokenizer: Tokenizer) -> nn.Module:
    """The model of a configuration on the CPU, initialised from the run's seed.

    config: a run of kind "model1" with a preset. Errors: `ConfigError` for a name not in NAMES.
    """
    if name not in NAMES:
        raise ConfigError(f"a configuration must be one of {', '.join(NAMES)}, got {name!r}")
    if name in SWITCHED_OFF:
        section = replace(config.model, switch_off=SWITCHED_OFF[name])
        return build_model(replace(config, model=section), tokenizer)
    assert config.model.preset is not None
    preset = preset_config(config.model.preset, tokenizer)
    with torch.device("meta"):  # to count, nothing is drawn
        size = size_of(Model(preset, compression_table=tokenizer.compression_table()))
    target = size.total - (size.rows if name == PLAIN else 0)
    torch.manual_seed(config.seed)
    shape = plain_shape(preset, target, config.data.seq_len)
    return PlainTransformer(shape, attention="flex" if config.device == "cuda" else "sdpa")


def plain_shape(like: ModelConfig, total: int, seq_len: int) -> PlainConfig:
    """A plain transformer of `like`'s width, depth and head width, the feed-forward layer filled
    up to `total` parameters within 2 %. Errors: `ConfigError` if no width of that layer does."""
    c, depth, width = like.hidden_size, like.num_hidden_layers, like.attention.latent_dim
    shape = PlainConfig(
        vocab_size=like.vocab_size,
        hidden_size=c,
        num_hidden_layers=depth,
        intermediate_size=_FFN_STEP,
        num_attention_heads=c // width if c % width == 0 else like.attention.num_attention_heads,
        max_position_embeddings=seq_len,
        rms_norm_eps=like.rms_norm_eps,
        rope_theta=like.attention.rope_theta,
    )
    missing = (total - shape.num_parameters) / (3 * c * depth * _FFN_STEP)
    shape = replace(shape, intermediate_size=_FFN_STEP * max(1, 1 + round(missing)))
    if abs(shape.num_parameters - total) > 0.02 * total:
        raise ConfigError(
            f"no plain transformer of {c} channels and {depth} layers has {total} parameters "
            f"within 2 %: the nearest has {shape.num_parameters}"
        )
    return shape


def size_of(model: nn.Module) -> Size:
    """Counts of a Model1 or a plain transformer; a tied embedding is multiplied with once."""
    named = dict(model.named_parameters())
    products = sum(p.numel() for n, p in named.items() if group_of(n, p) == "muon")
    if isinstance(model, PlainTransformer):
        shape, rows = model.config, 0
        channels = 2 * shape.num_hidden_layers * shape.hidden_size
    else:
        assert isinstance(model, Model)
        shape, rows = model.config, model.num_parameters()["tables"]
        width = shape.attention.latent_dim + shape.value_dim
        channels = shape.num_hidden_layers * shape.attention.num_attention_heads * width
    products += model.output_weight.numel()
    return Size(sum(p.numel() for p in named.values()), rows, products, channels)


def flop_per_token(size: Size, seq_len: int) -> float:
    """Operations that one token of training needs, the mean over a row of one document.

    6 N + 3 * 2 * channels * (seq_len + 1) / 2: forward once and backward twice, two operations a
    multiply-add; N = `products`; visible pairs of tokens alone. What is computed again in the
    backward pass, Engram's lookup and the mixing of streams do not count.
    """
    return 6.0 * size.products + 3.0 * size.channels * (seq_len + 1)
