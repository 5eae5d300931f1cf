"""Causal MHA of prefill and training, beside PyTorch's FlexAttention and its SDPA.

Ours and a peer's are called as `flash_attn_varlen_func`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases.case import Call, Case, Work
from benchmarks.kernel_inputs import normal

OPERATOR = "mha_prefill"
TESTS = ("tests/ops/test_mha_prefill*.py", "tests/test_flash_mla_gpu.py")
PEER_DIMS = ((192, 128), (128, 128))  # what FlashMLA compiles
TOKENS = 8192  # of all requests of a case

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [t, h, width], requests back to back


def _varlen(module: Any, b: int, s: int, device: torch.device) -> Attend:
    cu_seqlens = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = q.shape[2] ** -0.5
        ends = (cu_seqlens, cu_seqlens, s, s)
        return module.flash_attn_varlen_func(q, k, v, *ends, softmax_scale=scale, causal=True)[0]

    return attend


def _batched(b: int, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """`run`, which takes [b, h, s, width], on packed tensors; views alone."""

    def attend(*tensors: Tensor) -> Tensor:
        out = run(*(x.unflatten(0, (b, -1)).transpose(1, 2) for x in tensors))
        return out.transpose(1, 2).flatten(0, 1)

    return attend


def _is_visible(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return i >= j


def _flex(b: int, s: int, device: torch.device) -> Attend:
    torch.compiler.reset()  # each shape is compiled for itself, without running into a limit
    mask = create_block_mask(_is_visible, None, None, s, s, device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return _batched(b, functools.partial(compiled, block_mask=mask))


def _sdpa(b: int, _s: int, _device: torch.device) -> Attend:
    return _batched(b, functools.partial(scaled_dot_product_attention, is_causal=True))


def _may_run_peer(device: torch.device) -> bool:
    """FlashMLA's kernel is for sm_100; on sm_90 it breaks the process's CUDA context."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == 10


def mha_work(
    step: Literal["forward", "backward"], d: int, dv: int, h: int, b: int, s: int,
    device: torch.device,
) -> Work:  # fmt: skip
    """One step of b requests of s tokens; operations of the visible pairs are counted."""
    torch.manual_seed(1)
    is_backward = step == "backward"
    drawn = [normal(b * s, h, n, dtype=torch.bfloat16, device=device) for n in (d, d, dv, dv)]
    *inputs, dout = drawn
    inputs = [x.requires_grad_(is_backward) for x in inputs]

    def prepare(make: Callable[[int, int, torch.device], Attend]) -> Call:
        attend = make(b, s, device)
        if not is_backward:
            return lambda: (attend(*inputs),)
        out = attend(*inputs)
        return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)

    num_pairs = b * h * s * (s + 1) / 2
    width, moved = (3 * d + 2 * dv, 2) if is_backward else (d + dv, 1)
    rivals = {"flex": functools.partial(prepare, _flex), "sdpa": functools.partial(prepare, _sdpa)}
    num_bytes = 2 * moved * sum(x.numel() for x in drawn)
    return Work(
        lambda module: prepare(functools.partial(_varlen, module)),
        2.0 * num_pairs * width,
        num_bytes,
        rivals,
        takes_peer=(d, dv) in PEER_DIMS and _may_run_peer(device),
    )


def cases() -> Iterator[Case]:
    """Both steps for the published head dims."""
    for d, dv in ((192, 128), (128, 128)):
        for h in (32, 64, 128):
            for s in (4096, 8192):
                for step in ("forward", "backward"):
                    build = functools.partial(mha_work, step, d, dv, h, TOKENS // s, s)
                    yield Case(OPERATOR, f"{step} d={d}/{dv} h={h} s={s}", build)
