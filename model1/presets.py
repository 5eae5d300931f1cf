"""Ready-made architectures: plain functions that return a `ModelConfig`."""

from __future__ import annotations

import dataclasses

from model1.config import (
    AttentionConfig,
    EngramConfig,
    MhcConfig,
    ModelConfig,
    MoeConfig,
    SparseConfig,
    VvpaConfig,
    YarnConfig,
)


def tiny(*, vocab_size: int = 256, compressed_vocab_size: int = 200) -> ModelConfig:
    """A few hundred thousand parameters with every MODEL1 part on; for tests and first steps."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=3,
        intermediate_size=128,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        swiglu_limit=10.0,
        num_nextn_predict_layers=0,
        attention=_tiny_attention(),
        vvpa=VvpaConfig(
            rotary_value=True,
            output_gate=True,
            log_temperature=True,
            yarn=None,
            reference_length=32,
        ),
        sparse=SparseConfig(index_rank=16, index_topk=24, core_fraction=0.25, dense_below=32),
        mhc=MhcConfig(hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, res_init=5.0),
        moe=None,
        engram=_tiny_engram(compressed_vocab_size),
    )


def _tiny_attention() -> AttentionConfig:
    return AttentionConfig(
        form="model1",
        num_attention_heads=4,
        q_lora_rank=32,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        kv_lora_rank=None,
        v_head_dim=None,
        o_groups=2,
        o_lora_rank=32,
        sliding_window=8,
        attn_sink=True,
        rope_theta=10000.0,
    )


def _tiny_engram(compressed_vocab_size: int) -> EngramConfig:
    return EngramConfig(
        engram_layer_ids=(1,),
        engram_max_ngram_size=3,
        engram_n_heads=2,
        engram_head_dim=32,
        engram_vocab_size=512,
        engram_compressed_vocab_size=compressed_vocab_size,
        engram_pad_token_id=1,
        engram_seed=0,
        short_conv=False,
    )


def tiny_v32(*, vocab_size: int = 256, compressed_vocab_size: int = 200) -> ModelConfig:
    """`tiny` in V3.2's form with what it leaves off: experts, convolution, second head, YaRN."""
    base = tiny(vocab_size=vocab_size, compressed_vocab_size=compressed_vocab_size)
    assert base.engram is not None
    return dataclasses.replace(
        base,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
        attention=dataclasses.replace(
            base.attention,
            form="v32",
            qk_nope_head_dim=32,
            kv_lora_rank=128,
            v_head_dim=24,
        ),
        vvpa=dataclasses.replace(
            base.vvpa,
            rotary_value=False,
            yarn=YarnConfig(
                factor=4.0, original_max_position_embeddings=128, beta_fast=32.0, beta_slow=1.0
            ),
        ),
        moe=MoeConfig(
            n_routed_experts=4,
            n_shared_experts=1,
            num_experts_per_tok=2,
            moe_intermediate_size=48,
            routed_scaling_factor=1.5,
            first_k_dense_replace=1,
        ),
        engram=dataclasses.replace(base.engram, short_conv=True),
    )


def code_small(*, compressed_vocab_size: int) -> ModelConfig:
    """The shipped checkpoint's architecture: about 24 million parameters.

    Latent and sparse attention, VVPA, Engram and hyper-connections are on. The optional experts,
    second prediction head and Engram convolution are off.

    compressed_vocab_size comes from the tokenizer (`Tokenizer.compression_table().max() + 1`).
    Attention executes at most 30 % of dense multiply-adds beyond `dense_below` tokens.
    """
    return ModelConfig(
        vocab_size=8192,
        hidden_size=384,
        num_hidden_layers=8,
        intermediate_size=960,
        max_position_embeddings=16384,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
        swiglu_limit=10.0,
        num_nextn_predict_layers=0,
        attention=_code_small_attention(),
        vvpa=VvpaConfig(
            rotary_value=True,
            output_gate=True,
            log_temperature=True,
            yarn=None,
            reference_length=512,
        ),
        sparse=SparseConfig(index_rank=16, index_topk=512, core_fraction=0.07, dense_below=2048),
        mhc=MhcConfig(hc_mult=4, hc_sinkhorn_iters=8, hc_eps=1e-6, res_init=5.0),
        moe=None,
        engram=_code_small_engram(compressed_vocab_size),
    )


def _code_small_attention() -> AttentionConfig:
    return AttentionConfig(
        form="model1",
        num_attention_heads=6,
        q_lora_rank=192,
        qk_nope_head_dim=192,
        qk_rope_head_dim=32,
        kv_lora_rank=None,
        v_head_dim=None,
        o_groups=2,
        o_lora_rank=128,
        sliding_window=128,
        attn_sink=True,
        rope_theta=10000.0,
    )


def _code_small_engram(compressed_vocab_size: int) -> EngramConfig:
    return EngramConfig(
        engram_layer_ids=(1, 3),
        engram_max_ngram_size=3,
        engram_n_heads=4,
        engram_head_dim=32,
        engram_vocab_size=10000,
        engram_compressed_vocab_size=compressed_vocab_size,
        engram_pad_token_id=1,
        engram_seed=0,
        short_conv=False,
    )


def small_100m(*, vocab_size: int = 8192, compressed_vocab_size: int) -> ModelConfig:
    """About 100 million parameters without its 21 million of Engram rows, every part on.

    The model whose training step is compared with a plain transformer's
    (`python -m benchmarks.training_step`): 12 layers of 768 channels as in GPT-2 small. Six heads
    of 128 latent channels score and sum as many channels as that transformer's heads together; 128
    because FlexAttention works on channels rounded up to a power of two.
    """
    base = code_small(compressed_vocab_size=compressed_vocab_size)
    assert base.engram is not None
    assert base.mhc is not None
    return dataclasses.replace(
        base,
        vocab_size=vocab_size,
        hidden_size=768,
        num_hidden_layers=12,
        intermediate_size=2688,
        attention=dataclasses.replace(
            base.attention,
            q_lora_rank=384,
            qk_nope_head_dim=64,
            qk_rope_head_dim=64,
            o_lora_rank=256,
        ),
        mhc=dataclasses.replace(base.mhc, hc_sinkhorn_iters=20),
        engram=dataclasses.replace(
            base.engram,
            engram_layer_ids=(1, 5),
            engram_head_dim=64,
            engram_vocab_size=20000,
        ),
    )
