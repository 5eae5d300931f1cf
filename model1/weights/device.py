"""Where a model is loaded to: the device asked for, the dtype that suits it, whether it fits."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

from model1.errors import DeviceError

_GB = 1e9


def resolve_device(device: torch.device | str) -> torch.device:
    """The device asked for; DeviceError if it is unknown here or absent. Nothing is substituted."""
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {str(device)!r}: use 'cpu' or 'cuda'") from error
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise DeviceError(f"device must be 'cpu' or 'cuda', got {str(device)!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (resolved.index or 0) >= count:
        raise DeviceError(f"device {resolved} is absent: this machine has {count} CUDA devices")
    return resolved


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 on CUDA, fp32 on the CPU (where few processors multiply bf16 faster)."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def check_fit(needed_bytes: int, device: torch.device) -> None:
    """Raise DeviceError when needed_bytes exceed the free memory, where that can be known."""
    free_bytes = _free_bytes(device)
    if free_bytes is not None and needed_bytes > free_bytes:
        raise DeviceError(
            f"the checkpoint needs about {needed_bytes / _GB:.2f} GB on {device}, "
            f"{free_bytes / _GB:.2f} GB are free"
        )


def _free_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [n for n in (_available_ram_bytes(), _address_space_left_bytes()) if n is not None]
    return min(known) if known else None


def _available_ram_bytes() -> int | None:
    """MemAvailable of Linux: free memory plus what caches would give back."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    for line in meminfo.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _address_space_left_bytes() -> int | None:
    """What `ulimit -v` leaves to this process; None without a limit."""
    limit, statm = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not statm.is_file():
        return None
    used_bytes = int(statm.read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    return max(0, limit - used_bytes)
