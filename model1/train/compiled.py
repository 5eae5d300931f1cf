"""How a model is run in training: under which precision, and compiled in which pieces."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from model1.nn.model import Model
from model1.train.loss import ChunkLoss, Trainable, chunk_loss_sum

RECOMPILE_LIMIT = 64


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 matrix products where `precision` asks for them."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


class CompiledModel:
    """A model whose forward pass is one compiled graph; the module itself stays as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = cast(Trainable, model)
        self.forward_hidden = torch.compile(self.model.forward_hidden, dynamic=False)

    @property
    def output_weight(self) -> Tensor:
        """The model's output matrix."""
        return self.model.output_weight


def compile_parts(model: nn.Module, how: str) -> tuple[Trainable, ChunkLoss]:
    """What to train through: ("blocks") each layer and the exit, or ("model") all compiled.

    Graphs are for one batch shape.
    """
    if how == "none":
        return cast(Trainable, model), chunk_loss_sum
    from torch._dynamo import config as dynamo  # its import changes the environment

    # Layers differ in constants such as their number: each difference is one more graph. Too many
    # must be an error, not a silent return to uncompiled code.
    dynamo.recompile_limit = RECOMPILE_LIMIT
    dynamo.fail_on_recompile_limit_hit = True
    chunk_loss = torch.compile(chunk_loss_sum, dynamic=False)
    if how == "model":
        return CompiledModel(model), chunk_loss
    ahead = getattr(model, "mtp", None)
    for block in [*cast(nn.ModuleList, model.layers), *([] if ahead is None else [ahead.block])]:
        block.compile(dynamic=False)
    if isinstance(model, Model):
        model.exit = torch.compile(model.exit, dynamic=False)
    return cast(Trainable, model), chunk_loss
