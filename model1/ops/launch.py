"""What the launchers of Triton kernels ask about a device. Importing it needs no Triton."""

from __future__ import annotations

import functools
from typing import Any

import torch

from model1.ops.compile_cases import KernelTarget


@functools.cache
def device_target(device: torch.device) -> KernelTarget:
    """What kernels are compiled for there; the interpreter, on the CPU, runs what sm_80 would."""
    if device.type == "cpu":
        return KernelTarget("cuda", 80)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return KernelTarget("hip", properties.gcnArchName.partition(":")[0])
    return KernelTarget("cuda", 10 * properties.major + properties.minor)


# Channels of a row that serves as key and value: of the models' widest, and the most that a MODEL1
# row with 64 rotary ones has.
USUAL_CHANNELS = 576
_MAX_CHANNELS = 1088


def max_channels(target: KernelTarget, dtype: torch.dtype) -> int:
    """The widest row of a decode kernel whose smallest tile, 16 heads by 16 keys, fits a GPU.

    It takes 96 bytes of shared memory a channel, with queries in fp32 129: on GPUs with 99 KB that
    is 1024 and 768 channels. On AMD it lies in registers.
    """
    if target.kind == "hip" or target.arch in (80, 90, 100):
        return _MAX_CHANNELS
    return 768 if dtype == torch.float32 else 1024


@functools.cache
def num_sms(device: torch.device) -> int:
    """SMs (compute units on AMD) of a GPU; 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What a launch says to the compiler, as keyword arguments."""
    return {"num_warps": num_warps, "num_stages": num_stages}


def fast_divisor(divisor: int) -> tuple[int, int]:
    """(m, shift) with x // divisor = (2 x m >> 32) >> shift for every x of 31 bits."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << (31 + shift)) // divisor), shift
