"""Layers whose streams are collapsed by weights that were known one sublayer before.

X[l+1] = B[l] X[l] + C[l] F[l](A[l-1] X[l]); A, B, C of l: `HyperConnection.coefficients` of X[l].
The first collapse takes stream 0 alone, and the exit, without a head, the last sublayer's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from model1.config import ModelConfig
from model1.nn.block import Block
from model1.nn.layers import RmsNorm
from model1.nn.mhc import HyperHead
from model1.ops.engram import HashSpec
from model1.ops.mhc import MhcCoefficients
from model1.ops.mhc.chain import mhc_collapse_norm
from model1.ops.mhc.single_pass import mhc_write_back_collapse_norm

if TYPE_CHECKING:
    from model1.nn.context import Context


class Ahead(NamedTuple):
    """What a layer leaves for what comes behind it, beside the streams."""

    pre: Tensor  # [t, n] fp32, their weights in the next collapse
    u: Tensor | None  # [t, c], that collapse normalised, if the norm was known


class SinglePassBlock(Block):
    """`Block` in that form, with the same parameters."""

    @property
    def first_norm(self) -> RmsNorm | None:
        """Of what the layer before may collapse as it writes it; a memory changes the streams."""
        return self.attn_norm if self.engram is None else None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rows: Tensor | None,
        context: Context,
        ahead: Ahead | None = None,
        behind: RmsNorm | None = None,
    ) -> tuple[Tensor, Ahead]:
        """The streams, and how the sublayer behind collapses them.

        rows: as in `Block`. ahead: what the layer before returned, None for the first. behind: the
        norm of the collapse behind this layer, None if the streams change before it.
        """
        x, weights, q, kv, gate = self.before(x, rows, context, ahead)
        out = context.attend(self.layer_id, q, kv, self.attn.spec)
        return self.after(x, weights, out, gate, context, behind)

    def before(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, rows: Tensor | None, context: Context, ahead: Ahead | None
    ) -> tuple[Tensor, MhcCoefficients, Tensor, Tensor, Tensor | None]:
        """As in `Block`; the weights are of the write-back and of the next collapse."""
        assert self.mhc_attn is not None
        if self.engram is not None:
            assert rows is not None
            x = self.engram(x, rows, context)
        norm = self.attn_norm
        if ahead is None:
            u = norm(x[:, 0])
        elif ahead.u is None:
            u, x = mhc_collapse_norm(x, ahead.pre, norm.weight, norm_eps=norm.eps)
        else:
            u = ahead.u
        weights = self.mhc_attn.coefficients(x)
        q, kv, gate = self.attn.project(self.layer_id, u, context)
        return x, weights, q, kv, gate

    def after(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        weights: MhcCoefficients,
        out: Tensor,
        gate: Tensor | None,
        context: Context,
        behind: RmsNorm | None,
    ) -> tuple[Tensor, Ahead]:
        """As in `Block`."""
        assert self.mhc_ffn is not None
        y = self.attn.finish(out.type_as(x), gate, context)
        u, x = _write_back_collapse(x, y, weights, self.ffn_norm)
        weights = self.mhc_ffn.coefficients(x)
        y = self.ffn(u)
        if behind is None:
            return self.mhc_ffn.write_back(x, y, weights), Ahead(weights.pre, None)
        u, x = _write_back_collapse(x, y, weights, behind)
        return x, Ahead(weights.pre, u)


def _write_back_collapse(
    x: Tensor, y: Tensor, weights: MhcCoefficients, norm: RmsNorm
) -> tuple[Tensor, Tensor]:
    """The next sublayer's input [t, c] and the new streams."""
    pre, post, comb = weights
    return mhc_write_back_collapse_norm(x, y, post, comb, pre, norm.weight, norm_eps=norm.eps)


def is_single_pass(config: ModelConfig) -> bool:
    """Whether the model has hyper-connections of this form."""
    return config.mhc is not None and config.mhc.single_pass


def new_block(config: ModelConfig, layer_id: int, hash_spec: HashSpec | None = None) -> Block:
    """A layer of the form that the configuration asks for."""
    kind = SinglePassBlock if is_single_pass(config) else Block
    return kind(config, layer_id, hash_spec)


def new_head(config: ModelConfig) -> HyperHead | None:
    """The streams' learned exit, where there is one."""
    return None if config.mhc is None or config.mhc.single_pass else HyperHead(config)


def run_layers(
    layers: Sequence[nn.Module] | nn.ModuleList,
    x: Tensor,
    context: Context,
    norm: RmsNorm,
    memory: Callable[[nn.Module], Tensor | None],
) -> Tensor:
    """The normalised exit [t, c] of single-pass layers from the streams x [t, n, c].

    norm: the exit's; memory: a layer's Engram rows, None where it has none.
    """
    ahead: Ahead | None = None
    for layer, following in zip_longest(layers, layers[1:]):
        behind = norm if following is None else following.first_norm
        x, ahead = layer(x, memory(layer), context, ahead, behind)
    assert ahead is not None
    assert ahead.u is not None
    return ahead.u
