"""The strict model configuration: JSON both ways, and a message for everything that is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from model1 import presets
from model1.config import ModelConfig
from model1.errors import ConfigError
from model1.strict import build_dataclass

PRESETS = {
    "tiny": presets.tiny(),
    "tiny_v32": presets.tiny_v32(),
    "code_small": presets.code_small(compressed_vocab_size=6000),
    "all off": dataclasses.replace(
        presets.tiny(), sparse=None, mhc=None, engram=None, swiglu_limit=None
    ),
}


def data(name: str = "tiny_v32") -> dict[str, Any]:
    """A complete configuration as JSON would hold it; `tiny_v32` has every part."""
    return json.loads(json.dumps(PRESETS[name].to_dict()))


def place(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """The object that holds the key at a dotted path, and the key."""
    *parents, key = path.split(".")
    for parent in parents:
        config = config[parent]
    return config, key


def all_paths(config: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found.append(prefix + key)
        if isinstance(value, dict):
            found += all_paths(value, prefix + key + ".")
    return found


PATHS = [p for p in all_paths(data()) if p not in ("model_type", "architectures")]
WITH_DEFAULT = ["mhc.single_pass"]  # younger than the first files


# --- both ways ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PRESETS))
def test_json_gives_the_same_configuration_back(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]
    text = json.dumps(config.to_dict())
    assert ModelConfig.from_dict(json.loads(text)) == config
    assert hash(ModelConfig.from_dict(json.loads(text))) == hash(config)
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    assert ModelConfig.from_file(path) == config
    path.write_text(json.dumps({**config.to_dict(), "quantization": {"kind": "fp8"}}))
    assert ModelConfig.from_file(str(path)) == config


def test_the_file_names_what_it_is() -> None:
    written = PRESETS["tiny"].to_dict()
    assert written["model_type"] == "model1"
    assert written["architectures"] == ["Model1ForCausalLM"]
    assert set(written) - {"model_type", "architectures"} == {
        f.name for f in dataclasses.fields(ModelConfig)
    }


def test_a_configuration_cannot_be_changed() -> None:
    config = PRESETS["tiny"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 5  # type: ignore[misc]
    written = config.to_dict()
    written["attention"]["o_groups"] = 99
    assert config.attention.o_groups == 2


def test_reading_leaves_the_data_alone() -> None:
    given = data()
    before = copy.deepcopy(given)
    ModelConfig.from_dict(given)
    assert given == before


def test_an_integer_may_stand_for_a_real_number() -> None:
    given = data()
    given["attention"]["rope_theta"] = 10000
    rope_theta = ModelConfig.from_dict(given).attention.rope_theta
    assert isinstance(rope_theta, float)
    assert rope_theta == 10000.0


# --- derived values ----------------------------------------------------------------------


def test_latent_sizes_are_those_of_the_published_layouts() -> None:
    one, two = PRESETS["tiny"].attention, PRESETS["tiny_v32"].attention
    model1 = dataclasses.replace(one, qk_nope_head_dim=448, qk_rope_head_dim=64)
    assert (model1.latent_nope_dim, model1.latent_dim, model1.qk_head_dim) == (448, 512, 512)
    v32 = dataclasses.replace(two, qk_nope_head_dim=128, qk_rope_head_dim=64, kv_lora_rank=512)
    assert (v32.latent_nope_dim, v32.latent_dim, v32.qk_head_dim) == (512, 576, 192)


def test_value_and_memory_sizes() -> None:
    config = PRESETS["tiny"]
    assert config.value_dim == 96
    off = dataclasses.replace(config.vvpa, rotary_value=False)
    assert dataclasses.replace(config, vvpa=off).value_dim == 64
    assert config.num_streams == 4
    assert dataclasses.replace(config, mhc=None).num_streams == 1
    assert config.engram is not None
    assert (config.engram.num_tables, config.engram.embed_dim) == (4, 128)


# --- unknown, missing, mistyped ----------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in PATHS if path not in WITH_DEFAULT])
def test_a_missing_key_is_named(path: str) -> None:
    given = data()
    holder, key = place(given, path)
    del holder[key]
    with pytest.raises(ConfigError, match=f"^missing config key {path}$"):
        ModelConfig.from_dict(given)


@pytest.mark.parametrize("path", PATHS)
def test_a_misspelled_key_is_named(path: str) -> None:
    given = data()
    holder, key = place(given, path)
    holder[key + "_"] = holder[key]
    with pytest.raises(ConfigError, match=f"^unknown config key {path}_$"):
        ModelConfig.from_dict(given)


@pytest.mark.parametrize("path", PATHS)
def test_a_value_of_another_type_is_named(path: str) -> None:
    given = data()
    holder, key = place(given, path)
    good = holder[key]
    for wrong in ("7", [1, "x"], True, 1.5, None, {}):
        if wrong is None and path in OPTIONAL:
            continue
        if type(wrong) is type(good) or (isinstance(good, float) and wrong == 1.5):
            continue
        holder[key] = wrong
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_dict(given)
        message = str(caught.value)
        assert path in message, message
        if wrong != {}:
            shown = "'x'" if isinstance(wrong, list) and isinstance(good, list) else repr(wrong)
            assert shown in message, message


OPTIONAL = {
    "swiglu_limit", "sparse", "mhc", "moe", "engram", "vvpa.yarn",
    "attention.kv_lora_rank", "attention.v_head_dim",
}  # fmt: skip


@pytest.mark.parametrize(("value", "shown"), [("llama", "'llama'"), (None, "None")])
def test_another_kind_of_model_is_refused(value: str | None, shown: str) -> None:
    with pytest.raises(ConfigError, match=f"model_type must be 'model1', got {shown}"):
        ModelConfig.from_dict({**data(), "model_type": value})


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(ConfigError, match=r"cannot read config .*config\.json: No such file"):
        ModelConfig.from_file(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"config\.json is not valid JSON"):
        ModelConfig.from_file(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        ModelConfig.from_file(path)


def test_fields_with_a_default_may_be_left_out() -> None:
    @dataclasses.dataclass(frozen=True)
    class Part:
        size: int
        names: tuple[str, ...] = ("a",)

    globals()["Part"] = Part
    try:
        assert build_dataclass(Part, {"size": 3}) == Part(3)
        assert build_dataclass(Part, {"size": 3, "names": ["b"]}) == Part(3, ("b",))
        with pytest.raises(ConfigError, match=r"unknown config key where\.sise"):
            build_dataclass(Part, {"sise": 3}, where="where.")
    finally:
        del globals()["Part"]


# --- rules -------------------------------------------------------------------------------

POSITIVE = [
    "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size",
    "max_position_embeddings", "rms_norm_eps",
    *(f"attention.{k}" for k in (
        "num_attention_heads", "q_lora_rank", "qk_nope_head_dim", "o_groups", "o_lora_rank",
        "sliding_window", "rope_theta", "kv_lora_rank", "v_head_dim",
    )),
    "vvpa.reference_length", "vvpa.yarn.original_max_position_embeddings",
    "sparse.index_rank", "sparse.index_topk", "mhc.hc_sinkhorn_iters", "mhc.hc_eps",
    *(f"moe.{k}" for k in (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
        "routed_scaling_factor",
    )),
    *(f"engram.{k}" for k in (
        "engram_n_heads", "engram_head_dim", "engram_vocab_size", "engram_compressed_vocab_size",
    )),
]  # fmt: skip


@pytest.mark.parametrize("path", POSITIVE)
@pytest.mark.parametrize("value", [0, -3])
def test_a_number_that_is_not_positive_is_named(path: str, value: int) -> None:
    given = data()
    holder, key = place(given, path)
    real = isinstance(holder[key], float)
    holder[key] = float(value) if real else value
    with pytest.raises(ConfigError, match=rf"^{key} must be positive.* got {holder[key]}$"):
        ModelConfig.from_dict(given)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("attention.form", "mha", r"attention\.form must be one of \['model1', 'v32'\], got 'mha'"),
        ("attention.qk_rope_head_dim", 31, "qk_rope_head_dim must be even and positive, got 31"),
        ("attention.qk_rope_head_dim", 0, "qk_rope_head_dim must be even and positive, got 0"),
        ("attention.o_groups", 3, "o_groups must divide num_attention_heads 4, got 3"),
        ("attention.kv_lora_rank", None, "kv_lora_rank must be positive when form is 'v32', got N"),
        ("attention.v_head_dim", None, "v_head_dim must be positive when form is 'v32', got None"),
        ("vvpa.rotary_value", True, "rotary_value must be false when form is 'v32'"),
        ("vvpa.yarn.factor", 0.5, r"factor must be at least 1, got 0\.5"),
        ("vvpa.yarn.beta_slow", 40.0, r"must exceed beta_slow > 0, got 32\.0 and 40\.0"),
        ("vvpa.yarn.beta_slow", 0.0, r"must exceed beta_slow > 0, got 32\.0 and 0\.0"),
        ("sparse.core_fraction", 0.0, r"core_fraction must be in \(0, 1\], got 0\.0"),
        ("sparse.core_fraction", 1.5, r"core_fraction must be in \(0, 1\], got 1\.5"),
        ("sparse.dense_below", -1, "dense_below must not be negative, got -1"),
        ("sparse.index_rank", 129, "index_rank must be at most the latent's 128 .* got 129"),
        ("sparse.index_topk", 7, "index_topk must be at least sliding_window 8, got 7"),
        ("mhc.hc_mult", 1, "hc_mult must be at least 2, got 1"),
        ("moe.n_shared_experts", -1, "n_shared_experts must not be negative, got -1"),
        ("moe.num_experts_per_tok", 5, "at most n_routed_experts 4, got 5"),
        ("moe.first_k_dense_replace", -1, "first_k_dense_replace must not be negative, got -1"),
        ("engram.engram_layer_ids", [], "engram_layer_ids must not be empty"),
        ("engram.engram_layer_ids", [1, 1], r"must be distinct, got \[1, 1\]"),
        ("engram.engram_layer_ids", [3], r"engram_layer_ids must be in \[0, 3\), got \[3\]"),
        ("engram.engram_layer_ids", [-1], r"engram_layer_ids must be in \[0, 3\), got \[-1\]"),
        ("engram.engram_max_ngram_size", 1, "engram_max_ngram_size must be at least 2, got 1"),
        ("engram.engram_pad_token_id", 256, r"must be in \[0, 256\), got 256"),
        ("engram.engram_pad_token_id", -1, r"must be in \[0, 256\), got -1"),
        ("num_nextn_predict_layers", 2, "num_nextn_predict_layers must be 0 or 1, got 2"),
    ],
)
def test_a_broken_rule_names_key_value_and_rule(path: str, value: Any, message: str) -> None:
    given = data()
    holder, key = place(given, path)
    holder[key] = value
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_dict(given)
    assert key in str(caught.value)


@pytest.mark.parametrize("path", ["attention.kv_lora_rank", "attention.v_head_dim"])
def test_model1_has_no_value_projection(path: str) -> None:
    given = data("tiny")
    holder, key = place(given, path)
    holder[key] = 64
    with pytest.raises(ConfigError, match=f"{key} must be null when form is 'model1', got 64"):
        ModelConfig.from_dict(given)


@pytest.mark.parametrize("name", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("path", ["rms_norm_eps", "attention.rope_theta", "sparse.core_fraction"])
def test_a_number_that_is_not_finite_is_refused(path: str, name: str) -> None:
    given = data()
    holder, key = place(given, path)
    holder[key] = json.loads(name)
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_dict(given)


def test_a_limit_that_would_silence_every_feed_forward_is_refused() -> None:
    """Clamping `up` to [-limit, limit] needs a positive limit."""
    for limit in (0.0, -1.0):
        with pytest.raises(ConfigError, match=f"swiglu_limit must be positive.* got {limit}"):
            ModelConfig.from_dict({**data(), "swiglu_limit": limit})
