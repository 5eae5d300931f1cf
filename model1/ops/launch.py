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


@functools.cache
def num_sms(device: torch.device) -> int:
    """SMs (compute units on AMD) of a GPU; 1 for the interpreter."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch_options(num_warps: int, num_stages: int) -> dict[str, Any]:
    """What a launch says to the compiler, as keyword arguments."""
    return {"num_warps": num_warps, "num_stages": num_stages}
