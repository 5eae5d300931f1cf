"""Checks of how the rows of a batch belong to its requests, as prefix sums say it.

The numbers are looked at on the CPU alone: on a GPU the host would have to wait for them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def is_readable(tensor: Tensor) -> bool:
    """Whether its numbers are known and cost nothing: not on a GPU, nor in a graph being traced."""
    on_host = tensor.device.type == "cpu" and type(tensor) is Tensor  # a fake tensor has its class
    return on_host and not torch.compiler.is_compiling()


def counts_calls(tensor: Tensor) -> bool:
    """Whether the number of calls is what a step costs: on a CPU, where no gradient is recorded."""
    is_plain = tensor.is_cpu and type(tensor) is Tensor
    return is_plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def check_prefix_sums(
    axis: str, cu_seqlens: Tensor, max_seqlen: int, num_rows: int, *, owns_all: bool
) -> None:
    """Raise ValueError for prefix sums that fall, leave 0..num_rows or exceed max_seqlen.

    axis: "q" or "k", for the names. owns_all: every row belongs to a request.
    """
    if not is_readable(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(ends)]
    is_wrong = ends[-1] != num_rows if owns_all else ends[-1] > num_rows
    if ends[0] != 0 or is_wrong or min(lengths, default=0) < 0:
        to = num_rows if owns_all else f"at most {num_rows}"
        raise ValueError(f"cu_seqlens_{axis} must not fall and go from 0 to {to}, got {ends}")
    if max(lengths, default=0) > max_seqlen:
        got = max(lengths)
        raise ValueError(f"max_seqlen_{axis} is {max_seqlen}, but a request has {got} tokens")
