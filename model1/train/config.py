"""The settings of one training run as frozen data, read strictly from TOML.

An unknown, missing or mistyped key is a `ConfigError`. Paths are relative to the working
directory. `--set section.key=VALUE` overrides one key; VALUE is TOML (a bare word is a string).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from model1.errors import ConfigError
from model1.strict import build_dataclass, positive, require


def _share(part: Any, *names: str) -> None:
    for name in names:
        value = getattr(part, name)
        require(0.0 <= value <= 1.0, f"{name} must be in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which architecture is trained, and from which weights.

    Exactly one of `preset` (a function of `model1.presets`), `num_parameters` (kind "plain")
    or `init_from` (a checkpoint that brings its own architecture) decides the shape; a plain model
    with a preset takes the preset's parameter count.
    """

    kind: Literal["model1", "plain"]
    preset: str | None = None
    num_parameters: int | None = None
    init_from: str | None = None
    switch_off: tuple[str, ...] = ()  # left out: "engram", "mhc", "moe", "sparse", "vvpa"
    single_pass: bool = False  # with a preset: `MhcConfig.single_pass` instead of the preset's
    attention: Literal["sdpa", "flex"] = "sdpa"  # kind "plain" only: which kernel attends
    dense_attention: bool = False  # kind "model1" only: every layer dense, the selector unused
    yarn_factor: float | None = None  # with `init_from`: stretch the context it was trained on
    yarn_original_length: int | None = None  # tokens of that context

    def __post_init__(self) -> None:
        chosen = [n for n in ("preset", "num_parameters", "init_from") if getattr(self, n)]
        require(
            len(chosen) == 1,
            "model must give exactly one of preset, num_parameters and init_from, "
            f"got {', '.join(chosen) or 'none'}",
        )
        require(
            self.num_parameters is None or self.kind == "plain",
            f"num_parameters is only for kind 'plain', got kind {self.kind!r}",
        )
        require(
            not self.switch_off or (self.kind == "model1" and self.preset is not None),
            f"switch_off needs kind 'model1' and a preset, got {list(self.switch_off)}",
        )
        has_streams = self.kind == "model1" and self.preset and "mhc" not in self.switch_off
        require(
            not self.single_pass or bool(has_streams),
            "single_pass needs kind 'model1' and a preset with hyper-connections, "
            f"got kind {self.kind!r}, preset {self.preset!r}, switch_off {list(self.switch_off)}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """Where text comes from and how it becomes rows of `seq_len` tokens."""

    tokenizer: str  # folder of the tokenizer
    train: tuple[str, ...]  # folders of text, folders of .jsonl.xz shards, or single shards
    cache_dir: str  # tokenised text lives here and is reused
    seq_len: int
    batch_rows: int  # rows per optimiser step
    micro_batch_rows: int  # rows per forward pass; divides batch_rows
    suffixes: tuple[str, ...] = (".py", ".txt", ".md", ".rst")
    valid: tuple[str, ...] = ()
    valid_rows: int = 64
    chat: tuple[str, ...] = ()  # sources whose docstrings become questions and answers
    chat_share: float = 0.0  # share of the rows that are chat

    def __post_init__(self) -> None:
        positive(self, "seq_len", "batch_rows", "micro_batch_rows", "valid_rows")
        _share(self, "chat_share")
        require(len(self.train) > 0, "data.train must name at least one source")
        require(
            self.batch_rows % self.micro_batch_rows == 0,
            f"micro_batch_rows must divide batch_rows {self.batch_rows}, "
            f"got {self.micro_batch_rows}",
        )
        require(
            (self.chat_share > 0) == bool(self.chat),
            f"chat_share must be positive exactly when chat has sources, got {self.chat_share}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSection:
    """Learning rates at schedule factor 1, one for each parameter group."""

    muon_lr: float  # 2-D hidden matrices; see optim.Muon for the scale of one step
    embed_lr: float  # token embedding and output head
    scalar_lr: float  # norms, biases, gates, sinks, hyper-connections, routers
    table_lr: float  # Engram rows; five times the Adam rate of the rest (arXiv 2601.07372)
    muon_momentum: float = 0.95
    muon_weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    table_beta2: float = 0.99
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "muon_lr", "embed_lr", "scalar_lr", "table_lr", "clip_norm")
        _share(self, "muon_momentum", "adam_beta1", "adam_beta2", "table_beta2")
        require(
            self.muon_weight_decay >= 0,
            f"muon_weight_decay must not be negative, got {self.muon_weight_decay}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSection:
    """When the run ends and how the learning rates move; see `schedule.lr_factor`."""

    kind: Literal["cosine", "wsd"]
    max_steps: int
    max_seconds: float | None = None  # wall clock of all sittings; whichever limit is nearer counts
    warmup_steps: int = 0
    decay_fraction: float = 0.3  # kind "wsd": the last share of the run, linear
    final_factor: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "max_steps")
        _share(self, "decay_fraction", "final_factor")
        require(
            self.warmup_steps >= 0, f"warmup_steps must not be negative, got {self.warmup_steps}"
        )
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"max_seconds must be positive, got {self.max_seconds}",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSection:
    """Weights of the training-only terms beside cross-entropy."""

    mtp_weight: float | None = None  # None: 0.3; a number needs a model with an MTP head
    aux_weight: float = 1.0  # of every term that the model itself reports
    chunk_tokens: int = 16384  # tokens whose logits exist at one time

    def __post_init__(self) -> None:
        positive(self, "chunk_tokens")
        for name in ("mtp_weight", "aux_weight"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"{name} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SelectorSection:
    """Fitting of the sparse selectors when the run ends; see `model1.train.selector`."""

    steps: int
    lr: float
    rows: int = 32  # query rows of each packed row on which the loss is measured

    def __post_init__(self) -> None:
        positive(self, "steps", "lr", "rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class LogSection:
    """What is reported, how often, and how many checkpoints stay."""

    every_steps: int = 10
    valid_every_steps: int = 0  # 0: only at the end
    checkpoint_every_steps: int = 0  # 0: only at the end
    keep_last: int = 2

    def __post_init__(self) -> None:
        positive(self, "every_steps", "keep_last")
        for name in ("valid_every_steps", "checkpoint_every_steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    out_dir: str
    seed: int
    device: Literal["cpu", "cuda"]
    precision: Literal["fp32", "bf16"]  # of matrix products; weights and states stay fp32
    compile: Literal["none", "blocks", "model"]
    model: ModelSection
    data: DataSection
    optim: OptimSection
    schedule: ScheduleSection
    loss: LossSection = field(default_factory=LossSection)
    log: LogSection = field(default_factory=LogSection)
    selector: SelectorSection | None = None


def load_train_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a TOML file and apply `section.key=VALUE` overrides. Errors: `ConfigError`."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config {path} is not valid TOML: {error}") from error
    for text in overrides:
        _override(data, text)
    return build_dataclass(TrainConfig, data)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    require(bool(equals), f"an override must look like section.key=VALUE, got {text!r}")
    *sections, name = key.strip().split(".")
    for section in sections:
        data = data.setdefault(section, {})
        require(isinstance(data, dict), f"{section} in override {text!r} is not a section")
    try:
        data[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        data[name] = value.strip()
