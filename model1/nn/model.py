"""Model1 as a whole: embedding, blocks, head; full causal forward and one engine step."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.nn.attention import Attention
from model1.nn.context import Context, FullContext
from model1.nn.engram import Engram, ngram_windows
from model1.nn.indexer import LowRankSelector
from model1.nn.kv import CacheKind, KVCache, allocate
from model1.nn.layers import Embedding, Linear, RmsNorm
from model1.nn.metadata import AttentionMetadata
from model1.nn.mhc import HyperConnection
from model1.nn.moe import FeedForward, MixtureOfExperts
from model1.nn.mtp import MultiTokenPrediction
from model1.nn.paged import PagedContext, check_backend
from model1.nn.single_pass import is_single_pass, new_block, new_head, run_layers
from model1.ops.engram import build_hash_specs, check_compression_table

EMBED_INIT_STD = 0.02  # small, because a tied head would first predict every token's repetition


class Model(nn.Module):
    """A Model1 network.

    compression_table: [vocab_size] int64 of the tokenizer (`Tokenizer.compression_table()`),
    required exactly when the configuration has Engram; a table of another size is a ConfigError.
    """

    compression_table: Tensor

    def __init__(self, config: ModelConfig, *, compression_table: np.ndarray | None = None) -> None:
        super().__init__()
        self.config = config
        # The first training stage runs every layer dense; the selector is fitted after it.
        self.dense_attention = False
        # Query rows of each packed row and layer on which training measures the selector's loss.
        self.selector_rows = 0
        # Called with (layer id, latents [t, d]) by every full forward; for calibration.
        self.latent_hook: Callable[[int, Tensor], None] | None = None
        if (compression_table is None) != (config.engram is None):
            raise ConfigError("compression_table must be given exactly when the config has engram")
        specs = {}
        if config.engram is not None:
            assert compression_table is not None
            check_compression_table(compression_table, config.engram)
            if len(compression_table) != config.vocab_size:
                raise ConfigError(
                    f"compression_table must have vocab_size {config.vocab_size} entries, "
                    f"got {len(compression_table)}"
                )
            specs = build_hash_specs(config.engram)
            table = torch.from_numpy(np.ascontiguousarray(compression_table, dtype=np.int64))
            self.register_buffer("compression_table", table, persistent=False)
        self.embed = Embedding(config.vocab_size, config.hidden_size, std=EMBED_INIT_STD)
        self.layers = nn.ModuleList(
            new_block(config, i, specs.get(i)) for i in range(config.num_hidden_layers)
        )
        self.mhc_head = new_head(config)
        self.norm = RmsNorm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        )
        # In a list, so that a tied head's copy is no parameter of the model.
        self.packed_head: list[Linear] = []
        self.mtp = MultiTokenPrediction(config) if config.num_nextn_predict_layers else None

    # --- full causal forward -------------------------------------------------------------

    def forward(self, input_ids: Tensor, *, doc_starts: Tensor | None = None) -> Tensor:
        """Logits [b, s, vocab] fp32 of input_ids [b, s] int64; see `forward_hidden`."""
        hidden, _ = self.forward_hidden(input_ids, doc_starts=doc_starts)
        return self.logits(hidden)

    def forward_hidden(
        self, input_ids: Tensor, *, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Final hidden states [b, s, c] and auxiliary outputs (see `model1.train.loss`).

        doc_starts: [b, s] int64, the column where each token's document begins; None = one
        document per row. While `self.dense_attention` is set every visible token is attended to,
        whatever the sparse config says. Under torch.autocast the activations take its dtype.
        """
        b, s = input_ids.shape
        if doc_starts is None:
            doc_starts = torch.zeros_like(input_ids)
        device_type, dtype = input_ids.device.type, self.embed.weight.dtype
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            context = FullContext(
                self.config, doc_starts, dtype,
                dense=self.dense_attention, selector_rows=self.selector_rows,
                latent_hook=self.latent_hook,
            )  # fmt: skip
            ids = input_ids.flatten()
            ngrams = ngram_windows(ids, context.positions, self._ngram_size)
            x = self._run(ids, ngrams, context, dtype)
            aux: dict[str, Tensor] = {}
            if context.selector_losses:
                with torch.enable_grad():  # the backbone may run without gradients
                    aux["selector"] = torch.stack(context.selector_losses).mean()
            if self.mtp is not None and self.training:
                following = F.embedding(ids.roll(-1), self.embed.weight).to(dtype)
                aux["mtp_hidden"] = self.mtp(x, following, context).unflatten(0, (b, s))
        return x.unflatten(0, (b, s)), aux

    # --- one engine step -----------------------------------------------------------------

    def allocate_kv_cache(self, num_blocks: int, block_size: int, kind: CacheKind) -> KVCache:
        """An empty paged cache on the model's device."""
        return allocate(self.config, num_blocks, block_size, kind, self.embed.weight.device)

    def check_backend(self, backend: str) -> None:
        """Raise BackendUnavailable unless the backend runs every operator of an engine step."""
        check_backend(self.config, backend, self.embed.weight.device)

    def forward_paged(
        self, meta: AttentionMetadata, kv_cache: KVCache, backend: str = "auto"
    ) -> Tensor:
        """Logits [n, vocab] fp32 of meta.logits_rows; writes this step's keys into the cache.

        backend: of the operators that write the cache and attend to it (docs/backends.md).
        """
        context = PagedContext(self.config, meta, kv_cache, backend)
        x = self._run(
            meta.token_ids, meta.ngram_token_ids, context, self.embed.weight.dtype, meta.logits_rows
        )
        return self.logits(x)

    # --- parts ---------------------------------------------------------------------------

    @property
    def _ngram_size(self) -> int:
        return 1 if self.config.engram is None else self.config.engram.engram_max_ngram_size

    @property
    def output_weight(self) -> Tensor:
        """[vocab, c]: the head, or the embedding when they are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def pack_int8(self) -> None:
        """Let decode steps on a CPU read 8-bit copies of the matrices; see `Linear.pack_int8`."""
        if self.embed.weight.device.type != "cpu":
            raise ConfigError(f"int8 weights need a CPU model, got {self.embed.weight.device}")
        if self.head is None:
            tied = Linear(self.config.hidden_size, self.config.vocab_size)
            tied.weight = nn.Parameter(self.embed.weight.data, requires_grad=False)
            tied.pack_int8()
            self.embed.weight.data = tied.weight.data
            self.packed_head = [tied]
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack_int8()
        for module in self.modules():
            if isinstance(module, Attention | FeedForward):
                module.pack_int8()

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits of final hidden states."""
        if self.packed_head:
            return self.packed_head[0](hidden).float()
        return F.linear(hidden, self.output_weight.to(hidden.dtype)).float()

    def _run(
        self,
        token_ids: Tensor,
        ngram_token_ids: Tensor,
        context: Context,
        dtype: torch.dtype,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Embedding to final norm, [t, c], or only the given rows of it."""
        x = F.embedding(token_ids, self.embed.weight).to(dtype)
        x = x[:, None].expand(-1, self.config.num_streams, -1)
        if is_single_pass(self.config):

            def memory_of(layer: nn.Module) -> Tensor | None:
                return self._memory(layer, ngram_token_ids)

            u = run_layers(self.layers, x, context, self.norm, memory_of)
            return u if rows is None else u[rows]
        start = None
        for layer, following in zip_longest(self.layers, self.layers[1:]):
            memory = self._memory(layer, ngram_token_ids)
            behind = None if following is None else following.entrance
            x, start = layer(x, memory, context, start, behind)
        return self.exit(x if rows is None else x[rows])

    def _memory(self, layer: nn.Module, ngram_token_ids: Tensor) -> Tensor | None:
        """The layer's Engram rows, None where it has no memory."""
        engram = layer.engram
        if not isinstance(engram, Engram):
            return None
        return engram.rows(ngram_token_ids, self.compression_table)

    def exit(self, x: Tensor) -> Tensor:
        """Streams [t, n, c] to the normalised [t, c] that the head reads; not in single pass."""
        return self.norm(x[:, 0]) if self.mhc_head is None else self.mhc_head(x, self.norm)

    def after_optimizer_step(self) -> None:
        """Balance the experts, and make bases orthonormal again that training has moved."""
        moved = self.selector_rows > 0 or not self.dense_attention
        for module in self.modules():
            if isinstance(module, MixtureOfExperts):
                module.update_balance()
            elif isinstance(module, LowRankSelector) and moved:
                module.retract()

    @torch.no_grad()
    def diagnostics(self, input_ids: Tensor) -> dict[str, float]:
        """Worst Sinkhorn error of any hyper-connection on input_ids [b, s]; {} without them."""
        connections = [m for m in self.modules() if isinstance(m, HyperConnection)]
        if not connections:
            return {}
        for connection in connections:
            connection.worst_error = input_ids.new_zeros((), dtype=torch.float32)
        self.forward_hidden(input_ids)
        errors = [c.worst_error for c in connections if c.worst_error is not None]
        for connection in connections:
            connection.worst_error = None
        return {"sinkhorn_error": float(torch.stack(errors).max())}

    def num_parameters(self) -> dict[str, int]:
        """Counts: "total" and of it "tables" (Engram rows, trainable or stored)."""
        tables = 0
        stored = 0
        for module in self.modules():
            if isinstance(module, Engram):
                table = module.table
                if table.weight is not None:
                    tables += table.weight.numel()
                elif table.store is not None:
                    stored += table.store.num_rows * table.store.dim
        total = sum(p.numel() for p in self.parameters()) + stored
        return {"total": total, "tables": tables + stored}
