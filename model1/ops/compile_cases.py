"""How a Triton kernel module lists the configurations it launches, so that a tool can compile them.

Plain data; importing it needs no Triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class KernelTarget:
    """A GPU to compile for: ("cuda", 90) is sm_90, ("hip", "gfx942") an MI300."""

    kind: Literal["cuda", "hip"]
    arch: int | str

    @property
    def has_fp8(self) -> bool:
        """Whether Triton converts FP8 (e4m3) by an instruction there."""
        return self.kind == "cuda" and int(self.arch) >= 89


@dataclass(frozen=True, slots=True)
class CompileCase:
    """One kernel as it is launched for one target.

    signature: parameter name to "*bf16", "*u8", "*i32", "i64", "fp32", ... or "constexpr".
    constexprs: the values of the "constexpr" parameters.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # that a thread starts with, where the kernel divides them
    spill_limit_bytes: int = 0  # where docs/kernels_hopper.md says why
