"""The architecture of one model as frozen data: `ModelConfig` and its parts.

Keys are spelled as in DeepSeek's published configurations wherever the meaning is the same;
keys of our own start with `num_` or name what they switch. Architecture fields have no defaults:
`model1.presets` builds whole configurations. Nothing here knows about devices, batches or ports.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model1.strict import build_dataclass, not_negative, positive, read_json_object, require

MODEL_TYPE = "model1"


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnConfig:
    """YaRN context extension (arXiv 2309.00071); `factor` 1 leaves every frequency as it is."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float

    def __post_init__(self) -> None:
        require(self.factor >= 1.0, f"factor must be at least 1, got {self.factor}")
        positive(self, "original_max_position_embeddings")
        require(
            self.beta_fast > self.beta_slow > 0,
            f"beta_fast must exceed beta_slow > 0, got {self.beta_fast} and {self.beta_slow}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Latent attention with one key/value head.

    form "model1": one latent of qk_nope_head_dim + qk_rope_head_dim is both key and value.
    form "v32": latent of kv_lora_rank plus a rotary key; the value is the latent alone, and
    each head reads it through its own v_head_dim projection.
    """

    form: Literal["model1", "v32"]
    num_attention_heads: int
    q_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    kv_lora_rank: int | None  # form "v32" only
    v_head_dim: int | None  # form "v32" only
    o_groups: int
    o_lora_rank: int
    sliding_window: int  # most recent tokens that are always attended exactly
    attn_sink: bool
    rope_theta: float

    def __post_init__(self) -> None:
        require(
            self.form in ("model1", "v32"), f"form must be 'model1' or 'v32', got {self.form!r}"
        )
        positive(self, "num_attention_heads", "q_lora_rank", "qk_nope_head_dim", "o_groups")
        positive(self, "o_lora_rank", "sliding_window", "rope_theta")
        rope = self.qk_rope_head_dim
        require(
            rope > 0 and rope % 2 == 0, f"qk_rope_head_dim must be even and positive, got {rope}"
        )
        require(
            self.num_attention_heads % self.o_groups == 0,
            f"o_groups must divide num_attention_heads {self.num_attention_heads}, "
            f"got {self.o_groups}",
        )
        for name in ("kv_lora_rank", "v_head_dim"):
            value = getattr(self, name)
            if self.form == "v32":
                require(
                    value is not None and value > 0,
                    f"{name} must be positive when form is 'v32', got {value}",
                )
            else:
                require(value is None, f"{name} must be null when form is 'model1', got {value}")

    @property
    def latent_nope_dim(self) -> int:
        """Unrotated channels of one cached token: 448 for MODEL1, 512 for V3.2."""
        return self.qk_nope_head_dim if self.kv_lora_rank is None else self.kv_lora_rank

    @property
    def latent_dim(self) -> int:
        """Channels of one cached token, rotary ones included: 512 for MODEL1, 576 for V3.2."""
        return self.latent_nope_dim + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Channels of one query head before any absorption."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class VvpaConfig:
    """Value-vector position awareness: four parts, each neutral at the start of training."""

    rotary_value: bool  # value carries rotary channels, output is rotated back
    output_gate: bool  # 2*sigmoid(x W_g + c_h ln((i+1)/L0)) on each head's output
    log_temperature: bool  # logits times 1 + s_h ln(max(n, L0)/L0)
    yarn: YarnConfig | None
    reference_length: int  # L0

    def __post_init__(self) -> None:
        positive(self, "reference_length")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Token-level sparse attention: exact core chosen by a low-rank scan, low-rank remainder."""

    index_rank: int  # r: channels of the projected latent used for scan and remainder
    index_topk: int  # absolute cap of exactly attended tokens per query, the window included
    core_fraction: float  # rho: share of the visible tokens attended exactly
    dense_below: int  # queries that see at most this many tokens attend to all of them

    def __post_init__(self) -> None:
        positive(self, "index_rank", "index_topk")
        require(
            0.0 < self.core_fraction <= 1.0,
            f"core_fraction must be in (0, 1], got {self.core_fraction}",
        )
        not_negative(self, "dense_below")


@dataclass(frozen=True, kw_only=True, slots=True)
class MhcConfig:
    """Manifold-constrained hyper-connections (arXiv 2512.24880)."""

    hc_mult: int  # residual streams
    hc_sinkhorn_iters: int
    hc_eps: float
    res_init: float  # tau: the residual mixing logits start at tau * I
    # collapses take the weights of the sublayer before, the exit too; a default, for old files
    single_pass: bool = False

    def __post_init__(self) -> None:
        require(self.hc_mult >= 2, f"hc_mult must be at least 2, got {self.hc_mult}")
        positive(self, "hc_sinkhorn_iters", "hc_eps")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """DeepSeekMoE feed-forward: shared experts plus bias-balanced routed ones."""

    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    routed_scaling_factor: float
    first_k_dense_replace: int  # the first k layers keep a dense feed-forward

    def __post_init__(self) -> None:
        positive(self, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
        positive(self, "routed_scaling_factor")
        not_negative(self, "n_shared_experts", "first_k_dense_replace")
        require(
            self.num_experts_per_tok <= self.n_routed_experts,
            f"num_experts_per_tok must be at most n_routed_experts {self.n_routed_experts}, "
            f"got {self.num_experts_per_tok}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngramConfig:
    """Conditional memory by hashed n-grams (arXiv 2601.07372)."""

    engram_layer_ids: tuple[int, ...]  # global, 0-based
    engram_max_ngram_size: int  # orders 2..N
    engram_n_heads: int  # hashes per order
    engram_head_dim: int  # channels per row
    engram_vocab_size: int  # base size of every table; the primes start above it
    engram_compressed_vocab_size: int  # V' of the tokenizer compression; a mismatch is an error
    engram_pad_token_id: int  # uncompressed id that stands before the sequence start
    engram_seed: int
    short_conv: bool

    def __post_init__(self) -> None:
        require(len(self.engram_layer_ids) > 0, "engram_layer_ids must not be empty")
        require(
            len(set(self.engram_layer_ids)) == len(self.engram_layer_ids),
            f"engram_layer_ids must be distinct, got {list(self.engram_layer_ids)}",
        )
        require(
            self.engram_max_ngram_size >= 2,
            f"engram_max_ngram_size must be at least 2, got {self.engram_max_ngram_size}",
        )
        positive(self, "engram_n_heads", "engram_head_dim", "engram_vocab_size")
        positive(self, "engram_compressed_vocab_size")

    @property
    def num_tables(self) -> int:
        """Rows read per token and layer."""
        return (self.engram_max_ngram_size - 1) * self.engram_n_heads

    @property
    def embed_dim(self) -> int:
        """Channels of the concatenated rows."""
        return self.num_tables * self.engram_head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """One Model1 architecture. A part that is None is switched off."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    swiglu_limit: float | None
    num_nextn_predict_layers: int  # multi-token-prediction blocks, used in training only
    attention: AttentionConfig
    vvpa: VvpaConfig
    sparse: SparseConfig | None
    mhc: MhcConfig | None
    moe: MoeConfig | None
    engram: EngramConfig | None

    def __post_init__(self) -> None:
        positive(self, "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
        positive(self, "max_position_embeddings", "rms_norm_eps")
        require(
            self.swiglu_limit is None or self.swiglu_limit > 0,
            f"swiglu_limit must be positive or null, got {self.swiglu_limit}",
        )
        require(
            self.num_nextn_predict_layers in (0, 1),
            f"num_nextn_predict_layers must be 0 or 1, got {self.num_nextn_predict_layers}",
        )
        require(
            not (self.attention.form == "v32" and self.vvpa.rotary_value),
            "rotary_value must be false when form is 'v32': its value has no rotary channels",
        )
        if self.sparse is not None:
            require(
                self.sparse.index_rank <= self.attention.latent_nope_dim,
                f"index_rank must be at most the latent's {self.attention.latent_nope_dim} "
                f"unrotated channels, got {self.sparse.index_rank}",
            )
            require(
                self.sparse.index_topk >= self.attention.sliding_window,
                f"index_topk must be at least sliding_window {self.attention.sliding_window}, "
                f"got {self.sparse.index_topk}",
            )
        if self.engram is not None:
            require(
                all(0 <= i < self.num_hidden_layers for i in self.engram.engram_layer_ids),
                f"engram_layer_ids must be in [0, {self.num_hidden_layers}), "
                f"got {list(self.engram.engram_layer_ids)}",
            )
            require(
                0 <= self.engram.engram_pad_token_id < self.vocab_size,
                f"engram_pad_token_id must be in [0, {self.vocab_size}), "
                f"got {self.engram.engram_pad_token_id}",
            )

    @property
    def value_dim(self) -> int:
        """Latent channels that act as value: the rotary ones only with `rotary_value`."""
        latent = self.attention
        return latent.latent_dim if self.vvpa.rotary_value else latent.latent_nope_dim

    @property
    def num_streams(self) -> int:
        """Residual streams: 1 without hyper-connections."""
        return 1 if self.mhc is None else self.mhc.hc_mult

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; `from_dict` reads it back to an equal object."""
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["Model1ForCausalLM"],
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """Strict inverse of `to_dict`: an unknown, missing or wrongly typed key is an error."""
        data = dict(data)
        model_type = data.pop("model_type", None)
        require(model_type == MODEL_TYPE, f"model_type must be {MODEL_TYPE!r}, got {model_type!r}")
        data.pop("architectures", None)
        return build_dataclass(cls, data)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """Read `config.json`."""
        data = read_json_object(Path(path))
        data.pop("quantization", None)  # how the weights are stored; read by model1.weights
        return cls.from_dict(data)
