"""Triton kernels that order the choices of all tokens by expert: a stable counting sort.

Choices are cut into pieces. Each piece counts its experts, one program adds the counts up over
pieces and experts, and each piece writes where its choices go. Nothing is atomic and the host asks
the device for nothing.
"""
# Kernel parameters are pointers and run-time numbers, which have no Python type.
# pyright: reportMissingParameterType=none

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import launch_options

EXPERTS = 128  # of a program, at most: it holds a table of choices by experts
# entries of such a table, and pieces the adding program loads at once; others were not measured
TABLE, PIECES = 8192, 32
MAX_PIECES = 1024  # so that the adding program has few rounds


@triton.jit(do_not_specialize=["size", "steps"])
def _count_kernel(
    id_ptr, counts_ptr, size, steps, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # counts [pieces, NUM_EXPERTS]
    piece, expert = tl.program_id(0), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    count = tl.zeros((BLOCK_E,), tl.int32)
    for step in range(steps):
        choice = (piece.to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(id_ptr + choice, mask=choice < size, other=-1)
        count += tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
    where = counts_ptr + piece.to(tl.int64) * NUM_EXPERTS + expert
    tl.store(where, count, mask=expert < NUM_EXPERTS)


@triton.jit(do_not_specialize=["pieces"])
def _add_up_kernel(
    counts_ptr, ends_ptr, pieces, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    # counts become the place of the first choice of a piece and expert
    first = tl.zeros((), tl.int32)
    for start_e in range(0, NUM_EXPERTS, BLOCK_E):
        expert = start_e + tl.arange(0, BLOCK_E)
        is_expert = expert < NUM_EXPERTS
        total = tl.zeros((BLOCK_E,), tl.int32)
        for start in range(0, pieces, PIECES):
            piece = start + tl.arange(0, PIECES)
            where = counts_ptr + piece.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
            mask = (piece < pieces)[:, None] & is_expert[None, :]
            total += tl.sum(tl.load(where, mask=mask, other=0), axis=0)
        end = first + tl.cumsum(total, 0)
        tl.store(ends_ptr + expert, end, mask=is_expert)
        running = end - total
        for start in range(0, pieces, PIECES):
            piece = start + tl.arange(0, PIECES)
            where = counts_ptr + piece.to(tl.int64)[:, None] * NUM_EXPERTS + expert[None, :]
            mask = (piece < pieces)[:, None] & is_expert[None, :]
            count = tl.load(where, mask=mask, other=0)
            tl.store(where, running[None, :] + tl.cumsum(count, 0) - count, mask=mask)
            running += tl.sum(count, axis=0)
        first += tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["size", "steps"])
def _place_kernel(
    id_ptr, starts_ptr, position_ptr, size, steps, NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    piece, expert = tl.program_id(0), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    where = starts_ptr + piece.to(tl.int64) * NUM_EXPERTS + expert
    running = tl.load(where, mask=expert < NUM_EXPERTS, other=0)
    for step in range(steps):
        choice = (piece.to(tl.int64) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        chosen = tl.load(id_ptr + choice, mask=choice < size, other=-1)
        is_it = (chosen[:, None] == expert[None, :]) & (expert < NUM_EXPERTS)[None, :]
        one = is_it.to(tl.int32)
        place = running[None, :] + tl.cumsum(one, 0) - 1
        position = tl.sum(tl.where(is_it, place, 0), axis=1)
        is_here = tl.sum(one, axis=1) > 0
        # the programs of the first experts also mark the ids that no expert has
        is_nobody = (tl.program_id(1) == 0) & ((chosen < 0) | (chosen >= NUM_EXPERTS))
        position = tl.where(is_nobody, -1, position)
        tl.store(position_ptr + choice, position, mask=(choice < size) & (is_here | is_nobody))
        running += tl.sum(one, axis=0)


def sort_choices(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Where each choice lies among all, ordered by expert, and where each expert's end.

    expert_ids: [t, topk] int64; choices of one expert keep their order. Returns positions [t, topk]
    int32, -1 for an id outside 0..num_experts - 1, and ends [num_experts] int32.
    """
    positions = torch.empty(expert_ids.shape, dtype=torch.int32, device=expert_ids.device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=expert_ids.device)
    size = expert_ids.numel()
    if size == 0:
        return positions, ends.zero_()
    block_e, block = _blocks(num_experts)
    steps = -(-size // (block * MAX_PIECES))
    pieces = -(-size // (block * steps))
    counts = torch.empty(pieces, num_experts, dtype=torch.int32, device=expert_ids.device)
    ids = expert_ids.contiguous()
    grid = (pieces, -(-num_experts // block_e))
    sizes = {"NUM_EXPERTS": num_experts, "BLOCK_E": block_e}
    count: Any = _count_kernel
    add_up: Any = _add_up_kernel
    place: Any = _place_kernel
    with torch.cuda.device_of(ids):
        count[grid](ids, counts, size, steps, BLOCK=block, **sizes, **launch_options(4, 1))
        add_up[(1,)](counts, ends, pieces, PIECES=PIECES, **sizes, **launch_options(8, 1))
        place[grid](
            ids, counts, positions, size, steps, BLOCK=block, **sizes, **launch_options(4, 1)
        )
    return positions, ends


def _blocks(num_experts: int) -> tuple[int, int]:
    block_e = min(EXPERTS, max(16, int(triton.next_power_of_2(num_experts))))
    return block_e, TABLE // block_e


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """64 and 256 experts."""
    cases = []
    for num_experts in (64, 256):
        block_e, block = _blocks(num_experts)
        for name, kernel, warps in (
            ("count", _count_kernel, 4),
            ("add up", _add_up_kernel, 8),
            ("place", _place_kernel, 4),
        ):
            constants = {
                "NUM_EXPERTS": num_experts, "BLOCK_E": block_e, "BLOCK": block, "PIECES": PIECES
            }  # fmt: skip
            constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
            types = dict.fromkeys(kernel.arg_names, "i32") | {
                k: "*i32" for k in kernel.arg_names if k.endswith("_ptr")
            }
            types |= {"id_ptr": "*i64"} if "id_ptr" in kernel.arg_names else {}
            types |= dict.fromkeys(constants, "constexpr")
            cases.append(
                CompileCase(f"{name} {num_experts} experts", kernel, types, constants, warps, 1)
            )
    return cases
