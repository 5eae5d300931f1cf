"""The kernels of one training step by PyTorch's profiler, grouped by part and by phase."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from model1.train.data import Batch
from model1.train.step import TrainStep

# The first pattern that a kernel's name contains gives its group. Kernels that the compiler made
# carry the names of PyTorch's operations; ours carry their operator's.
GROUPS = (
    ("attention", r"flex_attention|mha_prefill|flash|fmha|scaled_dot_product|sdpa"),
    (
        "hyper-connections",
        r"mhc|sinkhorn|collapse_norm|write_back|_project_|_coefficients_|_seam_|_phi_bwd|_head_(bwd_)?kernel|_single_pass_",
    ),
    ("Engram", r"engram"),
    ("experts", r"_moe_|moe::"),
    ("loss", r"log_softmax|nll_loss|cross_entropy"),
    ("embedding", r"embedding|index_put|indexing_backward"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|splitk|_tem_fused|\bmm\b|::(add|b|badd)?mm"),
    ("norms, rope, gates, sums (fused)", r"triton_(poi|per|red|for|mix)"),
    ("copies and fills", r"mem(cpy|set)|copy_|fill|cat"),
)
OTHER = "other"
FORWARD, BACKWARD, UPDATE, UNLINKED = "forward", "backward", "update", "unlinked"
PHASES = (FORWARD, BACKWARD, UPDATE, UNLINKED)
SHOWN = 45  # kernels of the list
SHOWN_GAPS = 8
_STEPS = 2


class Kernel(NamedTuple):
    """One run of one kernel."""

    phase: str
    name: str
    us: float


def group_of_kernel(name: str) -> str:
    """Group of GROUPS by the kernel's name."""
    lower = name.lower()
    return next((group for group, pattern in GROUPS if re.search(pattern, lower)), OTHER)


def kernels_of(events: Iterable[Any], *, is_cuda: bool) -> list[Kernel]:
    """What ran, by the profiler's events; on a CPU each operation's own time.

    Work launched inside the range "update" is the update's; what another thread than the range
    "gradients" launches belongs to the backward pass, which autograd runs on a thread of its own
    for each GPU. On a CPU that thread is the caller's, and both passes count as forward.
    """
    on_cpu, on_gpu = [], []
    for event in events:
        is_cpu = event.device_type == torch.autograd.DeviceType.CPU
        (on_cpu if is_cpu else on_gpu).append(event)
    ranges = {name: [e for e in on_cpu if e.name == name] for name in ("gradients", UPDATE)}
    threads = {event.thread for event in ranges["gradients"]}

    def phase(event: Any) -> str:
        if event.thread not in threads:
            return BACKWARD
        start = event.time_range.start
        is_update = any(r.time_range.start <= start < r.time_range.end for r in ranges[UPDATE])
        return UPDATE if is_update else FORWARD

    found = []
    for event in on_cpu:
        if event.name in ranges:
            continue
        if is_cuda:
            found += [Kernel(phase(event), k.name, k.duration) for k in event.kernels]
        else:
            found.append(Kernel(phase(event), event.name, event.self_cpu_time_total))
    return found + _unlinked(on_gpu, found)


def _unlinked(on_gpu: Iterable[Any], found: Iterable[Kernel]) -> list[Kernel]:
    """Kernels that the profiler traced to no operation, by the difference of each name's sums."""
    left: dict[str, float] = defaultdict(float)
    for event in on_gpu:
        if not event.is_user_annotation:
            left[event.name] += event.time_range.elapsed_us()
    for kernel in found:
        left[kernel.name] -= kernel.us
    return [Kernel(UNLINKED, name, us) for name, us in left.items() if us > 1.0]


def format_profile(kernels: list[Kernel], num_steps: int) -> str:
    """Milliseconds of one step by group and phase, then the kernels that take most."""
    by_group: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in kernels:
        by_group[group_of_kernel(kernel.name)][kernel.phase] += kernel.us
        by_name[kernel.phase, kernel.name].append(kernel.us)
    scale = 1e-3 / num_steps
    lines = [f"{'ms of a step':34}" + "".join(f"{title:>10}" for title in (*PHASES, "all"))]

    def line(title: str, values: list[float]) -> str:
        return f"{title:34}" + "".join(f"{v * scale:10.2f}" for v in (*values, sum(values)))

    for group, times in sorted(by_group.items(), key=lambda item: -sum(item[1].values())):
        lines.append(line(group, [times[phase] for phase in PHASES]))
    totals = [sum(times[phase] for times in by_group.values()) for phase in PHASES]
    lines.append(line("sum", totals))
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:SHOWN]
    for (phase, name), times in top:
        lines.append(
            f"{sum(times) * scale:9.3f} ms {len(times) / num_steps:6.0f} x {phase:8} "
            f"{group_of_kernel(name):17.17} {name:.110}"
        )
    return "\n".join(lines)


def idle_times(events: Iterable[Any]) -> list[tuple[float, str, str]]:
    """Milliseconds in which no kernel ran, and the kernels around; the longest first."""
    kernels = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in events
        if event.device_type != torch.autograd.DeviceType.CPU and not event.is_user_annotation
    )
    gaps, last = [], kernels[0] if kernels else None
    for kernel in kernels:
        assert last is not None
        if kernel[0] > last[1]:
            gaps.append((1e-3 * (kernel[0] - last[1]), last[2], kernel[2]))
        last = max(last, kernel, key=lambda one: one[1])
    return sorted(gaps, reverse=True)


def format_idle(gaps: list[tuple[float, str, str]], num_steps: int) -> str:
    """How long a step had no kernel, and where that was longest."""
    total = sum(ms for ms, _, _ in gaps) / num_steps
    lines = [f"idle {total:.2f} ms of a step, of which at once:"]
    lines += [f"{ms:9.3f} ms  {a:.50}  ->  {b:.50}" for ms, a, b in gaps[:SHOWN_GAPS]]
    return "\n".join(lines)


def profile_step(step: TrainStep, batch: Batch) -> str:
    """The kernels of a warm model's next steps, and on a GPU how long none ran."""
    is_cuda = step.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if is_cuda else [])
    with profile(activities=activities) as found:
        for _ in range(_STEPS):
            with record_function("gradients"):
                step.gradients(batch)
            with record_function(UPDATE):
                step.update(1e-3)
        if is_cuda:
            torch.cuda.synchronize()
    events = list(found.events() or [])
    table = format_profile(kernels_of(events, is_cuda=is_cuda), _STEPS)
    return f"{table}\n{format_idle(idle_times(events), _STEPS)}" if is_cuda else table
