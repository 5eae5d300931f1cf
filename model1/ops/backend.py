"""Which implementation of an operator runs.

Built in are `ref` (plain PyTorch, any device), `triton` (any GPU that Triton compiles for) and, for
some operators, `hopper` (sm_90 alone). A third party adds one through the entry-point group
`model1.backends`: an object with the attributes of `Backend`. Each operator owns one `Operator`: a
table from backend name to function.

`resolve` turns what the caller asked for into a concrete name. "auto" takes `triton` on a GPU that
has it, on any other accelerator the plug-in that claims its type and provides the operator, and
`ref` elsewhere, and logs its choice; where `hopper` is faster is for the operator to know, which
asks `offers_hopper`. A name is obeyed or refused with `BackendUnavailable`.
Nothing falls back once a kernel was chosen.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Protocol, runtime_checkable

import torch

from model1.errors import BackendUnavailable

ENTRY_POINT_GROUP = "model1.backends"
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Gluon, the language of the Hopper kernels, still changes from one minor version to the next.
GLUON_TRITON = (3, 6)
_log = logging.getLogger(__name__)


@runtime_checkable
class Backend(Protocol):
    """What a plug-in provides, a module for instance; docs/backends.md is its manual."""

    @property
    def device_types(self) -> frozenset[str]:
        """Values of `torch.device.type` for which "auto" means this backend."""
        ...

    @property
    def operators(self) -> Mapping[str, Callable[..., Any]]:
        """Operator name to a function with the signature of that operator's `_ref`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Operator:
    """An operator's implementations: backend name to "module:function", imported on first use."""

    name: str
    implementations: Mapping[str, str]
    triton_min_capability: tuple[int, int] = (8, 0)

    def resolve(self, backend: str, device: torch.device) -> str:
        """The concrete backend for `backend` ("auto" or a name) on `device`.

        Raises BackendUnavailable with the rule that the request breaks.
        """
        return _resolve(self.name, backend, device.type, self._refusal(backend, device))

    def _refusal(self, backend: str, device: torch.device) -> str | None:
        """Why a built-in backend cannot run here; None for one that can, and for plug-ins."""
        if backend == "hopper":
            has_kernel = "hopper" in self.implementations
            return hopper_refusal(device) if has_kernel else "has no Hopper kernel"
        if backend not in ("auto", "triton") or (backend == "auto" and device.type == "cpu"):
            return None
        if "triton" not in self.implementations:
            return "has no Triton kernel"
        return triton_refusal(device, self.triton_min_capability)

    def resolve_call(
        self, backend: str, device: torch.device, hopper_refusal: str | None, hopper_wins: bool
    ) -> str:
        """`resolve` for one call: "auto" is `hopper` where its kernel takes the call and wins.

        hopper_refusal: why the Hopper kernel cannot take the call, None if it can.
        """
        chosen = self.resolve(backend, device)
        if chosen == "hopper" and hopper_refusal is not None:
            raise BackendUnavailable(f"{self.name}/hopper {hopper_refusal}")
        if backend != "auto" or chosen != "triton" or hopper_refusal or not hopper_wins:
            return chosen
        return "hopper" if self.offers_hopper(device) else chosen

    def offers_hopper(self, device: torch.device) -> bool:
        """Whether backend "hopper" would be obeyed on this device; an offer is logged once."""
        if self._refusal("hopper", device) is not None:
            return False
        _say_hopper(self.name)
        return True

    def load(self, backend: str) -> Callable[..., Any]:
        """The function of a concrete backend, as `resolve` returned it."""
        where = self.implementations.get(backend)
        if where is None:
            return _plug_in(backend).operators[self.name]
        return _import_function(where)


# What torch.compiler.assume_constant_result sets, without its import of the whole compiler: the
# choice is made while a graph is traced and is no part of it.
vars(Operator.resolve)["_dynamo_marked_constant"] = True
vars(Operator.offers_hopper)["_dynamo_marked_constant"] = True


def calls_ref_directly(backend: str) -> bool:
    """Whether an operator may skip PyTorch's dispatcher, where no gradient is recorded.

    That costs 75 us of CPU time a call, 300 us where a cache is written, and an engine step comes
    here several times a layer. AMD EPYC, torch 2.13, 2026-11.
    """
    recorded = torch.is_grad_enabled() or torch.compiler.is_compiling()
    return backend == "ref" and not recorded


def unless_fused(backend: str, x: torch.Tensor) -> str:
    """`backend`, or "ref" for "auto" where a small operator's kernel on a GPU is no gain.

    That is in a graph under torch.compile, which fuses plain PyTorch with what is around it and
    would have to stop at a kernel, and for x of a dtype that kernels do not take.
    """
    if backend != "auto" or not x.is_cuda:
        return backend
    is_plain = torch.compiler.is_compiling() or x.dtype not in KERNEL_DTYPES
    return "ref" if is_plain else backend


def triton_refusal(device: torch.device, min_capability: tuple[int, int]) -> str | None:
    """Why Triton cannot run on this device, or None if it can."""
    if not _has_triton():
        return "needs Triton, which is not installed (pip install 'model1-llm[gpu]')"
    if device.type == "cpu":
        # Triton's interpreter: slow, for tests of the kernels on a machine without a GPU
        interpreting = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreting else "needs a GPU, device is cpu"
    if device.type != "cuda":
        return f"needs a CUDA or ROCm GPU, device is {device.type}"
    if torch.version.hip is not None:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability < min_capability:
        asked, have = (f"sm_{major}{minor}" for major, minor in (min_capability, capability))
        return f"needs {asked}, device is {have}"
    return None


@functools.cache
def hopper_refusal(device: torch.device) -> str | None:
    """Why the Hopper kernels cannot run on this device, or None if they can."""
    if not _has_triton():
        return "needs Triton, which is not installed (pip install 'model1-llm[gpu]')"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"needs an sm_90 GPU, device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"needs sm_90, device is sm_{capability[0]}{capability[1]}"
    wanted, found = ".".join(map(str, GLUON_TRITON)), _triton_version()
    is_wanted = found == wanted or found.startswith(f"{wanted}.")
    return None if is_wanted else f"needs Triton {wanted}, found {found}"


def _triton_version() -> str:
    return importlib.import_module("triton").__version__


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _import_function(where: str) -> Callable[..., Any]:
    module, _, function = where.partition(":")
    return getattr(importlib.import_module(module), function)


@functools.cache
def plug_ins() -> dict[str, Backend]:
    """Installed third-party backends by name, loaded once.

    Raises BackendUnavailable for one that cannot be loaded and for a name that is taken.
    """
    found: dict[str, Backend] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in ("auto", "ref", "triton", "hopper") or point.name in found:
            raise BackendUnavailable(
                f"a plug-in may not be called {point.name!r}: the name is taken"
            )
        try:
            plug_in = point.load()
        except Exception as error:  # third-party code may raise anything; say whose it is
            raise BackendUnavailable(f"backend {point.name!r} cannot be loaded: {error}") from error
        if not isinstance(plug_in, Backend):
            raise BackendUnavailable(
                f"backend {point.name!r} needs the attributes device_types and operators"
            )
        found[point.name] = plug_in
    return found


def _plug_in(name: str) -> Backend:
    found = plug_ins()
    if name not in found:
        known = ", ".join(["auto", "ref", "triton", "hopper", *sorted(found)])
        raise BackendUnavailable(f"backend must be one of {known}, got {name!r}")
    return found[name]


@functools.cache  # one log line per operator, request and device type
def _resolve(operator: str, backend: str, device_type: str, refusal: str | None) -> str:
    if backend == "auto":
        name = _automatic(operator, device_type, refusal)
        why = f": triton {refusal}" if name == "ref" and device_type != "cpu" else ""
        _log.info("%s runs on backend %s (%s)%s", operator, name, device_type, why)
        return name
    if backend == "ref":
        return backend
    if backend in ("triton", "hopper"):
        if refusal is not None:
            raise BackendUnavailable(f"{operator}/{backend} {refusal}")
        return backend
    if operator not in _plug_in(backend).operators:
        raise BackendUnavailable(f"{operator}/{backend}: the plug-in does not provide {operator}")
    return backend


@functools.cache
def _say_hopper(operator: str) -> None:
    _log.info("%s runs on backend hopper (cuda) in calls where it is the faster one", operator)


def _automatic(operator: str, device_type: str, triton_is_refused: str | None) -> str:
    if device_type == "cpu":
        return "ref"
    if device_type == "cuda":
        return "ref" if triton_is_refused else "triton"
    claims = sorted(
        name
        for name, plug_in in plug_ins().items()
        if device_type in plug_in.device_types and operator in plug_in.operators
    )
    if len(claims) > 1:
        raise BackendUnavailable(
            f"backends {', '.join(claims)} all claim {device_type}: name one of them"
        )
    return claims[0] if claims else "ref"
