"""Which implementation of a block-scaled FP8 product runs. A device without FP8 units is refused.

Beside the usual backends there is `scaled_mm`: our quantisation kernel and PyTorch's own product,
which is cuBLAS's on sm_90.
"""

from __future__ import annotations

import functools

import torch

from model1.errors import BackendUnavailable
from model1.ops.backend import Operator, triton_refusal

# cuBLAS, as PyTorch calls it, multiplies 1 x 128 groups on sm_90 alone, from CUDA 12.9 on:
# _check_deepseek_support in aten/src/ATen/native/cuda/ScaledBlas.cpp, torch 2.10 to 2.13.
_SCALED_MM_CUDA = (12, 9)
_AMD_WITH_FP8 = ("gfx94", "gfx95", "gfx12")

QUANTIZE = Operator(
    name="fp8_quantize",
    implementations={
        "ref": "model1.ops.fp8_linear.ref:fp8_quantize_ref",
        "triton": "model1.ops.fp8_linear.portable:fp8_quantize_triton",
    },
    triton_min_capability=(8, 9),
)
MATMUL = Operator(
    name="fp8_matmul",
    implementations={
        "ref": "model1.ops.fp8_linear.ref:fp8_matmul_ref",
        "triton": "model1.ops.fp8_linear.portable_matmul:fp8_matmul_triton",
        "scaled_mm": "model1.ops.fp8_linear.scaled:fp8_matmul_scaled",
    },
    triton_min_capability=(8, 9),
)


def choose_backend(backend: str, device: torch.device, fits_scaled_mm: bool) -> str:
    """The concrete backend; "auto" takes scaled_mm where it runs and the sizes fit its blocks.

    Raises BackendUnavailable for a GPU without FP8 units unless the reference, which emulates
    them, is asked for by name.
    """
    if backend != "ref" and (refusal := fp8_refusal(device)):
        raise BackendUnavailable(f"fp8_linear/{backend} {refusal}")
    if backend == "scaled_mm" and (refusal := scaled_mm_refusal(device)):
        raise BackendUnavailable(f"fp8_linear/scaled_mm {refusal}")
    is_offered = backend == "auto" and fits_scaled_mm and scaled_mm_refusal(device) is None
    if is_offered and triton_refusal(device, QUANTIZE.triton_min_capability) is None:
        return "scaled_mm"
    if backend == "scaled_mm":
        QUANTIZE.resolve("triton", device)
        return backend
    name = MATMUL.resolve(backend, device)
    if name == "ref" and backend == "auto" and device.type == "cuda":
        raise BackendUnavailable(
            "fp8_linear/auto needs Triton on a GPU: install it, or name backend='ref', which "
            "emulates, or precision='bf16'"
        )
    QUANTIZE.resolve(name, device)
    return name


# chosen while a graph is traced and no part of it, as Operator.resolve
vars(choose_backend)["_dynamo_marked_constant"] = True


@functools.cache
def fp8_refusal(device: torch.device) -> str | None:
    """Why a GPU cannot multiply FP8, None for one that can and for other devices."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        has_units = name.startswith(_AMD_WITH_FP8)
    else:
        capability = torch.cuda.get_device_capability(device)
        name, has_units = f"sm_{capability[0]}{capability[1]}", capability >= (8, 9)
    if has_units:
        return None
    rule = "needs FP8 matrix units (sm_89, gfx942 or newer)"
    return f"{rule}, device is {name}: precision='bf16' runs there"


@functools.cache
def scaled_mm_refusal(device: torch.device) -> str | None:
    """Why PyTorch's block-scaled product does not run here, None where it does."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an sm_90 GPU, device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs sm_90, device is sm_{capability[0]}{capability[1]}"
    if not hasattr(torch.nn.functional, "scaled_mm"):
        return f"needs torch 2.10 or newer, this is {torch.__version__}"
    cuda = tuple(map(int, (torch.version.cuda or "0.0").split(".")[:2]))
    return None if cuda >= _SCALED_MM_CUDA else f"needs CUDA 12.9, torch has {torch.version.cuda}"
