"""One optimiser step of one model on one device: gradients of a batch, then the update.

What a run repeats, without its data, schedule and files; the trainer and the benchmark share it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from model1.train.compiled import autocast, compile_parts
from model1.train.config import TrainConfig
from model1.train.data import Batch
from model1.train.loss import count_targets, training_loss
from model1.train.optim import Optimizer


class TrainStep:
    """A model, already on its device, with its optimiser and its compiled parts.

    Neither half waits for the device, except for tables whose gradient is not sparse.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model, self.config, self.device = model, config, device
        self.optimizer = Optimizer(model, config.optim)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where autocast leaves fp32
        self.trainable, self.chunk_loss = compile_parts(model, config.compile)

    def gradients(self, whole: Batch) -> dict[str, Tensor]:
        """Add the gradient of `whole`, [batch_rows, seq_len], to each `.grad`; the loss terms."""
        data, settings = self.config.data, self.config.loss
        self.model.train()
        counts = count_targets(whole)
        whole = whole.to(self.device)
        num_rows = len(whole.input_ids)
        share = data.micro_batch_rows / num_rows
        totals: dict[str, Tensor] = {}
        for first in range(0, num_rows, data.micro_batch_rows):
            rows = slice(first, first + data.micro_batch_rows)
            batch = type(whole)(*(part[rows] for part in whole))
            with autocast(self.device, self.config.precision):
                terms = training_loss(
                    self.trainable,
                    batch,
                    settings,
                    counts=counts,
                    share=share,
                    chunk_loss=self.chunk_loss,
                )
            terms["loss"].backward()
            for name, value in terms.items():
                totals[name] = totals.get(name, torch.zeros_like(value)) + value.detach()
        return totals

    def update(self, factor: float) -> Tensor:
        """Clip, move every weight at learning-rate `factor`, drop gradients; their norm."""
        norm = self.optimizer.clip()
        self.optimizer.step(factor)
        if hasattr(self.model, "after_optimizer_step"):
            cast(Any, self.model).after_optimizer_step()
        return norm
