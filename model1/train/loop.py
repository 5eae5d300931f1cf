"""The training loop: one device, one model, from a configuration to a finished checkpoint.

Weights and optimiser states are fp32; matrix products run in `precision`. On a CPU a run bounded
by steps is exact: stopped and resumed it ends in the same bits as without the stop.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from model1.errors import ConfigError, Model1Error
from model1.nn.model import Model
from model1.tokenizer import Tokenizer
from model1.train.checkpoint import (
    Progress,
    checkpoint_path,
    list_checkpoints,
    prune_checkpoints,
    restore,
    rng_tensors,
    write_checkpoint,
)
from model1.train.compiled import autocast
from model1.train.config import TrainConfig
from model1.train.data import PackedRows, RowStream, TokenCache, text_cache
from model1.train.finetune import chat_cache
from model1.train.log import RunLog, truncate_log
from model1.train.loss import check_loss
from model1.train.models import build_model
from model1.train.plot import plot_losses
from model1.train.schedule import lr_factor, progress
from model1.train.selector import fit_selector
from model1.train.step import TrainStep
from model1.train.valid import held_out_loss
from model1.weights.device import resolve_device

DIAGNOSED_TOKENS = 256  # of one row, for each report
LOG_NAME, PLOT_NAME, FINAL_NAME = "log.jsonl", "loss.png", "final"


class Trainer:
    """One run. Errors of any user input are raised while it is built, before the first step."""

    def __init__(self, config: TrainConfig, *, resume: bool = False, quiet: bool = False) -> None:
        self.config, self.quiet = config, quiet
        self.out_dir = Path(config.out_dir)
        self.device = resolve_device(config.device)
        found = list_checkpoints(self.out_dir)
        if found and not resume:
            raise ConfigError(
                f"out_dir {self.out_dir} already holds a run; resume it or name another"
            )
        if resume and not found:
            raise ConfigError(f"out_dir {self.out_dir} holds no checkpoint to resume from")
        self.tokenizer = Tokenizer.from_dir(config.data.tokenizer)
        model = build_model(config, self.tokenizer)  # refuses a bad config before files are made
        check_loss(config.loss, model)
        self.stream, self.valid = self._open_data()
        self.model = model.to(self.device)
        self.train_step = TrainStep(self.model, config, self.device)
        self.optimizer = self.train_step.optimizer
        self.progress = Progress()
        self._rate_mark = 0, 0.0  # tokens and seconds at the last report
        torch.manual_seed(config.seed)
        if resume:
            states = self.optimizer.state()
            self.progress = restore(found[-1], self.model, states, self.device)

    def _open_data(self) -> tuple[RowStream, TokenCache | None]:
        data, seed = self.config.data, self.config.seed
        where = data.cache_dir, data.suffixes
        main = PackedRows(text_cache(data.train, self.tokenizer, *where), data.seq_len, seed)
        extra = None
        if data.chat:
            chat = chat_cache(data.chat, self.tokenizer, *where, data.seq_len)
            extra = PackedRows(chat, data.seq_len, seed)
        valid = text_cache(data.valid, self.tokenizer, *where) if data.valid else None
        return RowStream(main, extra, data.chat_share), valid

    def run(self, *, stop_after_seconds: float | None = None) -> Progress:
        """Train to the end of the schedule, or save and return after `stop_after_seconds`.

        Writes log.jsonl, checkpoints and, at the end of the schedule, final/ and loss.png.
        """
        truncate_log(self.out_dir / LOG_NAME, self.progress.step)
        with RunLog(self.out_dir / LOG_NAME, quiet=self.quiet) as log:
            counts = self._parameter_counts()
            log.say(", ".join(f"{name} {count:,}" for name, count in counts.items()))
            log.write(step=self.progress.step, parameters=counts, config=asdict(self.config))
            self._rate_mark = self.progress.tokens, self.progress.seconds
            begin = time.perf_counter()
            while not self._is_over():
                if stop_after_seconds and time.perf_counter() - begin > stop_after_seconds:
                    break
                self._step_and_report(log)
            self._save()
            if self._is_over():
                self._finish(log)
        return self.progress

    def _is_over(self) -> bool:
        return progress(self.config.schedule, self.progress.step, self.progress.seconds) >= 1.0

    def _step_and_report(self, log: RunLog) -> None:
        every = self.config.log
        is_due = (self.progress.step + 1) % every.every_steps == 0 or self.progress.step == 0
        begin = time.perf_counter()
        factor = lr_factor(self.config.schedule, self.progress.step, self.progress.seconds)
        terms, norm = self.step(factor)
        values: dict[str, float] = {}
        if is_due:  # the only time at which the host waits for the device
            values = {name: float(value) for name, value in terms.items()}
            values["grad_norm"] = float(norm)
        seconds = time.perf_counter() - begin
        data = self.config.data
        self.progress = replace(
            self.progress,
            step=self.progress.step + 1,
            rows=self.progress.rows + data.batch_rows,
            tokens=self.progress.tokens + data.batch_rows * data.seq_len,
            seconds=self.progress.seconds + seconds,
        )
        if is_due:
            self._report(log, values, factor)
        step = self.progress.step
        if every.valid_every_steps and step % every.valid_every_steps == 0:
            self._report_validation(log)
        if every.checkpoint_every_steps and step % every.checkpoint_every_steps == 0:
            self._save()

    def step(self, factor: float) -> tuple[dict[str, Tensor], Tensor]:
        """One optimiser step at learning-rate `factor`: loss terms and gradient norm, on device."""
        whole = self.stream.batch(self.progress.rows, self.config.data.batch_rows)
        return self.train_step.gradients(whole), self.train_step.update(factor)

    def _report(self, log: RunLog, values: dict[str, float], factor: float) -> None:
        if not math.isfinite(values["loss"] + values["grad_norm"]):
            raise Model1Error(
                f"training diverged at step {self.progress.step}: loss {values['loss']}, "
                f"gradient norm {values['grad_norm']}"
            )
        done, rate = self.progress, self._tokens_per_second()
        log.write(
            **asdict(done),
            **values,
            lr_factor=factor,
            lr=self.config.optim.muon_lr * factor,
            tokens_per_second=rate,
            **self._diagnostics(),
        )
        share = progress(self.config.schedule, done.step, done.seconds)
        log.progress(share, step=done.step, loss=values["cross_entropy"], tokens_per_s=rate)

    def _tokens_per_second(self) -> float:
        """Since the last report; the host has just waited for the device."""
        tokens, seconds = self._rate_mark
        self._rate_mark = self.progress.tokens, self.progress.seconds
        return (self.progress.tokens - tokens) / max(self.progress.seconds - seconds, 1e-9)

    def _diagnostics(self) -> dict[str, float]:
        if not hasattr(self.model, "diagnostics"):
            return {}
        row = self.stream.batch(self.progress.rows, 1).input_ids[:, :DIAGNOSED_TOKENS]
        with torch.compiler.set_stance("force_eager"):  # another shape: not worth a compilation
            return cast(Any, self.model).diagnostics(row.to(self.device))

    def _report_validation(self, log: RunLog) -> None:
        if self.valid is None:
            return
        values = held_out_loss(
            self.train_step.trainable,
            self.model,
            self.valid,
            self.config.data,
            self.device,
            lambda: autocast(self.device, self.config.precision),
        )
        log.write(step=self.progress.step, tokens=self.progress.tokens, **values)
        log.say("  ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def _save(self) -> None:
        folder = checkpoint_path(self.out_dir, self.progress.step)
        if not folder.exists():
            states = {**self.optimizer.state(), **rng_tensors(self.device)}
            self._write(folder, states=states, progress=self.progress)
            prune_checkpoints(self.out_dir, self.config.log.keep_last)

    def _write(self, folder: Path, **parts: Any) -> None:
        config = cast(Any, self.model).config.to_dict()
        write_checkpoint(folder, config=config, model=self.model, tokenizer=self.tokenizer, **parts)

    def _fit_selector(self, log: RunLog) -> None:
        section, model = self.config.selector, self.model
        if section is None or not isinstance(model, Model):
            return
        data = self.config.data
        first = self.progress.rows  # rows after those the run has seen
        batches = (
            self.stream.batch(first + i * data.micro_batch_rows, data.micro_batch_rows)
            for i in itertools.count()
        )
        with autocast(self.device, self.config.precision):
            losses = fit_selector(
                model,
                (batch.to(self.device) for batch in batches),
                steps=section.steps,
                lr=section.lr,
                rows=section.rows,
                say=log.say,
            )
        log.write(step=self.progress.step, selector_losses=losses)

    def _finish(self, log: RunLog) -> None:
        self._fit_selector(log)
        self._report_validation(log)
        self._write(self.out_dir / FINAL_NAME)
        name = self.out_dir.name
        if plot_losses({name: self.out_dir / LOG_NAME}, self.out_dir / PLOT_NAME):
            log.say(f"loss plot: {self.out_dir / PLOT_NAME}")
        else:
            log.say(f"no loss plot: matplotlib is not installed; see {self.out_dir / LOG_NAME}")
        log.say(f"model: {self.out_dir / FINAL_NAME}")

    def _parameter_counts(self) -> dict[str, int]:
        groups = self.optimizer.groups.items()
        counts = {name: sum(p.numel() for _, p in named) for name, named in groups}
        return {"total": sum(counts.values()), **counts}
