"""GPU timing by CUDA events, and the two ceilings that every figure is a share of."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_HIDE_LAUNCH_CYCLES = 800_000  # the GPU spins this long while the host enqueues the timed work


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call over the repeats."""

    median_us: float
    min_us: float
    max_us: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device reaches in this process: bytes copied (read + written) and bf16 products."""

    copy_gb_per_s: float
    bf16_tflops: float


def time_call(
    call: Callable[[], Any], *, repeats: int = 20, warmup: int = 3, graph: bool = False
) -> Timing:
    """Device time of `call`, host launches hidden; with `graph` of replaying its CUDA graph."""
    for _ in range(warmup):
        call()
    torch.cuda.synchronize()
    run: Callable[[], Any] = call
    if graph:
        captured = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(captured):
                call()
        except Exception:
            _forget_capture()
            raise
        run = captured.replay
        run()
    samples = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HIDE_LAUNCH_CYCLES)
        begin.record()
        run()
        end.record()
        end.synchronize()
        samples.append(1e3 * begin.elapsed_time(end))
    return Timing(statistics.median(samples), min(samples), max(samples))


def waits_for_device(call: Callable[[], Any]) -> bool:
    """Whether the host of a call that has run before waits for the device: no graph captures it."""
    call()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def _forget_capture() -> None:
    """After a failed capture PyTorch takes random numbers to be captured still: a fresh state."""
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    generator.graphsafe_set_state(torch.Generator("cuda").graphsafe_get_state())


def measure_ceilings(device: torch.device) -> Ceilings:
    """Copy of 2 GiB and an 8192-cubed bf16 product of random data."""
    source = torch.ones(1 << 30, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    copied = time_call(lambda: target.copy_(source))
    num_bytes = 2 * source.numel() * source.element_size()
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = time_call(lambda: a @ b)
    return Ceilings(num_bytes / copied.median_us / 1e3, 2 * 8192**3 / product.median_us / 1e6)
