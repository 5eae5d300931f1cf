"""MHA prefill in Triton, for any GPU: the launches and the list of kernels.

Why kernels of our own and no library: PyTorch's FlexAttention compiles for every pair of head
dims at run time and works on channels rounded up to a power of two (192 as 256, 576 as 1024),
`torch.nn.attention.varlen` wants d == dv of at most 256, and neither runs in Triton's interpreter.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from model1.ops.channel_pieces import channel_pieces
from model1.ops.compile_cases import CompileCase, KernelTarget
from model1.ops.launch import device_target, launch_options
from model1.ops.mha_prefill.portable_backward import (
    _mha_prefill_bwd_dkdv_kernel,
    _mha_prefill_bwd_dq_kernel,
)
from model1.ops.mha_prefill.portable_forward import _mha_prefill_fwd_kernel
from model1.ops.mha_prefill.portable_sizes import Config, Kernel, choose_config

_KERNELS: dict[Kernel, Any] = {
    "fwd": _mha_prefill_fwd_kernel,
    "dq": _mha_prefill_bwd_dq_kernel,
    "dkdv": _mha_prefill_bwd_dkdv_kernel,
}


def mha_prefill_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """See `model1.ops.mha_prefill.mha_prefill`. fp32 multiplies in IEEE fp32, slowly."""
    t, h, _ = q.shape
    out = torch.empty(t, h, v.shape[2], dtype=q.dtype, device=q.device)
    lse = torch.empty(h, t, dtype=torch.float32, device=q.device)
    config = config or _config("fwd", q, v)
    num_tiles = triton.cdiv(max_seqlen_q, config.block_m)
    programs = num_tiles * h * (len(cu_seqlens_q) - 1)
    if programs > 0:
        with torch.cuda.device_of(q):
            _mha_prefill_fwd_kernel[(programs,)](
                cu_seqlens_q_ptr=cu_seqlens_q, cu_seqlens_k_ptr=cu_seqlens_k, out_ptr=out,
                lse_ptr=lse, num_tiles=num_tiles, softmax_scale=softmax_scale, **_inputs(q, k, v),
                **_constants(q, k, v, causal, config),
            )  # fmt: skip
    return out, lse.T


def mha_prefill_backward_triton(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float,
    causal: bool,
    configs: tuple[Config, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; configs: of the kernel for dq, of the one for dk and dv."""
    dq_config, dkdv_config = configs or (_config("dq", q, v), _config("dkdv", q, v))
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    lse = lse.T.contiguous()
    delta = torch.empty_like(lse)
    b = len(cu_seqlens_q) - 1
    shared = {
        "cu_seqlens_q_ptr": cu_seqlens_q, "cu_seqlens_k_ptr": cu_seqlens_k, "d_out_ptr": d_out,
        "lse_ptr": lse, "delta_ptr": delta, "softmax_scale": softmax_scale,
    }  # fmt: skip
    with torch.cuda.device_of(q):
        tiles = triton.cdiv(max_seqlen_q, dq_config.block_m)
        if programs := tiles * q.shape[1] * b:
            _mha_prefill_bwd_dq_kernel[(programs,)](
                out_ptr=out, dq_ptr=dq, num_tiles=tiles,
                **shared, **_inputs(q, k, v), **_constants(q, k, v, causal, dq_config),
            )  # fmt: skip
        tiles = triton.cdiv(max_seqlen_k, dkdv_config.block_n)
        if programs := tiles * k.shape[1] * b:
            _mha_prefill_bwd_dkdv_kernel[(programs,)](
                dk_ptr=dk, dv_ptr=dv, num_tiles=tiles,
                **shared, **_inputs(q, k, v), **_constants(q, k, v, causal, dkdv_config),
            )  # fmt: skip
    return dq, dk, dv


def _config(kernel: Kernel, q: Tensor, v: Tensor) -> Config:
    return choose_config(kernel, device_target(q.device), max(q.shape[2], v.shape[2]), q.dtype)


def _inputs(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Any]:
    return {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "stride_kt": k.stride(0), "stride_kh": k.stride(1), "stride_vt": v.stride(0),
        "stride_vh": v.stride(1), "t": len(q),
    }  # fmt: skip


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool, config: Config) -> dict[str, Any]:
    """What a kernel is compiled for, and its options."""
    h, d, dv = q.shape[1], q.shape[2], v.shape[2]
    constants = _constexprs(h, h // k.shape[1], d, dv, causal, config)
    return constants | launch_options(config.num_warps, config.num_stages)


def _constexprs(
    h: int, group: int, d: int, dv: int, causal: bool, config: Config
) -> dict[str, Any]:
    return {
        "H": h,
        "GROUP": group,
        "D": d,
        "DV": dv,
        "K_PIECES": _pieces(d, config),
        "V_PIECES": _pieces(dv, config),
        "CAUSAL": causal,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
    }


def _pieces(d: int, config: Config) -> tuple[tuple[int, int, int], ...]:
    # pieces of one width share their layouts, and with them registers
    return channel_pieces(0, d, config.channels, 64 if d > 64 else 16)


_SIGNATURE = dict.fromkeys(("q", "k", "v", "out", "d_out", "dq", "dk", "dv"), "*bf16") | {
    "cu_seqlens_q": "*i32", "cu_seqlens_k": "*i32", "lse": "*fp32", "delta": "*fp32",
}  # fmt: skip


def shipped_kernels(target: KernelTarget) -> list[CompileCase]:
    """Forward and backward for the published head dims and for the models' shared latents."""
    cases = []
    for d, dv, hkv in ((128, 128, 16), (192, 128, 16), (224, 224, 1), (512, 512, 1), (576, 512, 1)):
        for name, kernel in _KERNELS.items():
            config = choose_config(name, target, max(d, dv), torch.bfloat16)
            # The launcher compiles for strides that are multiples of 16, which a signature
            # cannot say.
            strides = {
                "stride_qt": 16 * d, "stride_qh": d, "stride_kt": hkv * d, "stride_kh": d,
                "stride_vt": hkv * dv, "stride_vh": dv,
            }  # fmt: skip
            constants = _constexprs(16, 16 // hkv, d, dv, True, config)
            cases.append(
                CompileCase(
                    name=f"mha_prefill_{name} {d} {dv}",
                    kernel=kernel,
                    signature={f"{name}_ptr": kind for name, kind in _SIGNATURE.items()}
                    | {"t": "i32", "num_tiles": "i32", "softmax_scale": "fp32"},
                    constexprs=constants | strides,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            )
    return cases
