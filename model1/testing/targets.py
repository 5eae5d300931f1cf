"""The GPUs that every kernel is compiled for, and what each allows."""

from __future__ import annotations

from dataclasses import dataclass

from model1.ops.compile_cases import KernelTarget


@dataclass(frozen=True, slots=True)
class Target:
    """A GPU architecture: the most shared memory a block may ask for, and whether it may spill."""

    gpu: KernelTarget
    shared_limit_bytes: int
    may_spill: bool = False


# CUDA programming guide, table of compute capabilities; AMD CDNA3 and CDNA4 ISA: the LDS.
TARGETS = {
    "sm_80": Target(KernelTarget("cuda", 80), 163 << 10),
    "sm_86": Target(KernelTarget("cuda", 86), 99 << 10, may_spill=True),
    "sm_89": Target(KernelTarget("cuda", 89), 99 << 10),
    "sm_90": Target(KernelTarget("cuda", 90), 227 << 10),
    "sm_100": Target(KernelTarget("cuda", 100), 227 << 10, may_spill=True),
    "sm_120": Target(KernelTarget("cuda", 120), 99 << 10),
    "gfx942": Target(KernelTarget("hip", "gfx942"), 64 << 10, may_spill=True),
    "gfx950": Target(KernelTarget("hip", "gfx950"), 160 << 10, may_spill=True),
}
