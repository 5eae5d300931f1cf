"""Where a layer's keys come from: the packed rows themselves, or the paged cache.

`FullContext` serves training and scoring (keys are the tokens of the same forward),
`PagedContext` one engine step. Both give every layer positions, angles and `attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from model1.config import ModelConfig
from model1.nn.attention import AttendSpec
from model1.nn.indexer import ROW_CHUNK
from model1.nn.selector_loss import sample_rows, selector_loss
from model1.ops.backend import unless_fused
from model1.ops.dense_attention import dense_attention
from model1.ops.engram import engram_causal_conv
from model1.ops.rope import (
    Rotation,
    apply_rope,
    rope_frequencies,
    rotate_tail,
    rotation,
    yarn_frequencies,
)
from model1.ops.rope_gate import inverse_rope_gate

# Query rows of one dense pass on the plain path: bounds the score matrix to rows * h * s.
DENSE_ROW_CHUNK = 256


class Context(Protocol):
    """What the layers read, and who does the steps of attention that differ between contexts."""

    rotation: Rotation  # [t, d_rope] each
    log_position: Tensor  # [t] fp32, ln((i + 1) / L0)

    def latents(self, layer_id: int, kv: Tensor, spec: AttendSpec) -> Tensor:
        """kv [t, d] normalised and rotated, kept where `attend` looks; what that needs of it."""
        ...

    def attend(self, layer_id: int, q: Tensor, latents: Tensor, spec: AttendSpec) -> Tensor:
        """Attention of q [t, h, d], [t, h, value_dim]; latents as `latents` returned them."""
        ...

    def finish_values(self, out: Tensor, gate: Tensor | None, *, is_rotary: bool) -> Tensor:
        """Values [t, h, dv], rotary channels turned back where there are any, times gate [t, h]."""
        ...

    def short_conv(
        self, layer_id: int, x: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """Engram's convolution of x [t, n*d] with its values dilation * j tokens earlier."""
        ...


def frequencies(config: ModelConfig) -> Tensor:
    """Angular frequencies of the rotary pairs, YaRN applied where configured."""
    base = rope_frequencies(config.attention.qk_rope_head_dim, config.attention.rope_theta)
    yarn = config.vvpa.yarn
    if yarn is None:
        return base
    return yarn_frequencies(
        base, factor=yarn.factor, original_length=yarn.original_max_position_embeddings,
        beta_fast=yarn.beta_fast, beta_slow=yarn.beta_slow,
    )  # fmt: skip


def _sent(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on the device; a GPU gets it after earlier work, for which no one waits."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def log_position(positions: Tensor, reference_length: int) -> Tensor:
    """ln((i + 1) / L0) of integer positions i [t] (not negative), L0 = reference_length; [t] fp32.

    0 at the last position of the reference length, negative before it. What it is for: `nn.vvpa`.
    """
    return torch.log((positions + 1).to(torch.float32) / reference_length)


def attend_row(
    q: Tensor, kv: Tensor, key_start: Tensor, key_end: Tensor, spec: AttendSpec,
    dense_limit: int | None,
) -> Tensor:  # fmt: skip
    """All query rows of one packed row: dense where few tokens are visible, sparse elsewhere.

    q: [t, h, d]; kv: [s, d]; key_start, key_end: [t] int64, row i sees keys key_start[i] <= j <
    key_end[i]. Queries that see at most dense_limit tokens run dense, None = all. Returns
    [t, h, spec.value_dim] in kv's dtype, t > 0; a row that sees no key gives 0. All keys must be
    finite, hidden ones too (see `dense_attention`). The host waits for the device.
    Which rows are dense is our choice, by cost.
    """
    selector = spec.selector
    if selector is None or dense_limit is None or int((key_end - key_start).max()) <= dense_limit:
        return _dense_rows(q, key_start, key_end, spec, kv)
    is_dense = key_end - key_start <= dense_limit
    z, pieces = selector.project(kv[:, : selector.basis.shape[1]]), []
    for rows in torch.arange(len(q), device=q.device).split(ROW_CHUNK):
        for part in (rows[is_dense[rows]], rows[~is_dense[rows]]):
            if len(part) == 0:
                continue
            if bool(is_dense[part[0]]):
                out = _dense_rows(q[part], key_start[part], key_end[part], spec, kv)
            else:
                end = int(key_end[part].max())  # later keys are invisible to every row
                out = selector.attend(
                    q[part], z[:end], kv[:end], key_start[part], key_end[part],
                    value_dim=spec.value_dim, softmax_scale=spec.softmax_scale,
                    attn_sink=spec.attn_sink,
                ).out  # fmt: skip
            pieces.append((part, out))
    order = torch.cat([part for part, _ in pieces]).argsort()
    return torch.cat([out for _, out in pieces])[order]


def _dense_rows(
    q: Tensor, key_start: Tensor, key_end: Tensor, spec: AttendSpec, kv: Tensor
) -> Tensor:
    outs = []
    for i in range(0, len(q), DENSE_ROW_CHUNK):
        start, end = key_start[i : i + DENSE_ROW_CHUNK], key_end[i : i + DENSE_ROW_CHUNK]
        out, _ = dense_attention(
            q[i : i + DENSE_ROW_CHUNK], kv[: int(end.max())], start, end,
            value_dim=spec.value_dim, softmax_scale=spec.softmax_scale, attn_sink=spec.attn_sink,
            return_lse=False,
        )  # fmt: skip
        outs.append(out)
    return outs[0] if len(outs) == 1 else torch.cat(outs)


class FullContext:
    """b packed rows of s tokens; each token sees its own document up to itself."""

    def __init__(
        self,
        config: ModelConfig,
        doc_starts: Tensor,
        dtype: torch.dtype,
        *,
        dense: bool,
        selector_rows: int = 0,
        latent_hook: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """doc_starts [b, s]: where each token's document begins; `dense` turns sparsity off.

        selector_rows > 0 collects the selector's loss on that many query rows of each packed row
        and layer in `selector_losses`.
        """
        b, s = doc_starts.shape
        self.shape = (b, s)
        column = torch.arange(s, device=doc_starts.device)
        self.key_start, self.key_end = doc_starts, (column + 1).expand(b, s)
        self.positions = (column - doc_starts).flatten()
        self.rotation = rotation(self.positions, _sent(frequencies(config), doc_starts.device))
        self.log_position = log_position(self.positions, config.vvpa.reference_length)
        self.d_nope = config.attention.latent_nope_dim
        sparse = None if dense else config.sparse
        self.dense_limit = None if sparse is None or s <= sparse.dense_below else sparse.dense_below
        self.dense_below = 0 if config.sparse is None else config.sparse.dense_below
        self.selector_rows, self.latent_hook = selector_rows, latent_hook
        self.selector_losses: list[Tensor] = []
        self.block_mask: Any = None
        # In fp32 the wide latent does not fit the fused kernel's shared memory.
        if doc_starts.is_cuda and self.dense_limit is None and dtype != torch.float32:
            from model1.ops.dense_attention.flex import packed_block_mask

            self.block_mask = packed_block_mask(doc_starts)

    def latents(self, layer_id: int, kv: Tensor, spec: AttendSpec) -> Tensor:
        """See Context; differentiable, and plain where a compiled block fuses it."""
        d_rope = self.rotation.cos.shape[-1]
        if len(spec.kv_norm.weight) == kv.shape[1]:
            return rotate_tail(spec.kv_norm(kv), self.rotation)
        nope, rotary = kv.split([kv.shape[1] - d_rope, d_rope], dim=-1)
        nope = spec.kv_norm(nope)
        return torch.cat([nope, apply_rope(rotary, self.rotation)], dim=-1)

    def attend(self, layer_id: int, q: Tensor, latents: Tensor, spec: AttendSpec) -> Tensor:
        """See Context."""
        b, s = self.shape
        q_rows, kv_rows = q.unflatten(0, (b, s)), latents.unflatten(0, (b, s))
        if self.latent_hook is not None:
            self.latent_hook(layer_id, latents)
        if self.selector_rows and spec.selector is not None:
            self._collect_selector_losses(q_rows, kv_rows, spec)
        if self.block_mask is not None:
            from model1.ops.dense_attention.flex import flex_dense_attention

            return flex_dense_attention(
                q_rows, kv_rows, self.block_mask,
                value_dim=spec.value_dim, softmax_scale=spec.softmax_scale,
                attn_sink=spec.attn_sink,
            ).flatten(0, 1)  # fmt: skip
        outs = [
            attend_row(
                q_rows[i], kv_rows[i], self.key_start[i], self.key_end[i], spec, self.dense_limit
            )
            for i in range(b)
        ]
        return torch.cat(outs)

    def finish_values(self, out: Tensor, gate: Tensor | None, *, is_rotary: bool) -> Tensor:
        """See Context; differentiable, and plain where a compiled block fuses it."""
        if out.is_cuda and unless_fused("auto", out) == "auto":
            angles, d_rope = (self.rotation if is_rotary else None), self.rotation.cos.shape[-1]
            return inverse_rope_gate(out, angles, gate, d_rope=d_rope)
        if is_rotary:
            out = rotate_tail(out, self.rotation, inverse=True)
        return out if gate is None else out * gate[..., None]

    def _collect_selector_losses(self, q: Tensor, kv: Tensor, spec: AttendSpec) -> None:
        for i in range(len(q)):
            start, end = self.key_start[i], self.key_end[i]
            rows = sample_rows(end - start, self.dense_below, self.selector_rows)
            self.selector_losses.append(
                selector_loss(q[i], kv[i], start, end, spec, self.d_nope, rows)
            )

    def short_conv(
        self, layer_id: int, x: Tensor, weight: Tensor, norm_weight: Tensor, dilation: int,
        eps: float,
    ) -> Tensor:  # fmt: skip
        """See Context."""
        return engram_causal_conv(
            x, self.positions, weight, norm_weight, dilation=dilation, eps=eps
        )
