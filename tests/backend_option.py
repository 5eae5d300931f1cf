"""`pytest --backend NAME`: the operators' tests on an installed plug-in instead of the references.

`backend="auto"`, the default of every operator, then means the plug-in for each operator that it
provides; the others keep their own "auto" and stand in pytest's header. Where the plug-in claims a
device type, its functions get their tensors there, with their strides, and the tests get them back.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from line_budget import ROOT, is_triton_file, python_files
from torch import Tensor, UntypedStorage
from torch.utils._pytree import tree_map_only

from model1.errors import BackendUnavailable
from model1.ops import backend as dispatch

TESTED = "ref"  # what the tests of a reference name; "auto" with --backend
BACKENDS: list[Any] = [TESTED, pytest.param("triton", marks=pytest.mark.triton)]


def operator_names() -> set[str]:
    """Every operator of the library."""
    names = set()
    for path in python_files("model1/ops"):
        if not is_triton_file(path):
            parts = path.relative_to(ROOT).with_suffix("").parts
            module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
            names |= {x.name for x in vars(module).values() if isinstance(x, dispatch.Operator)}
    return names


def use_backend(name: str) -> str:
    """Make "auto" mean this plug-in in this process; returns the header's line."""
    global TESTED
    try:
        plug_in = dispatch.plug_ins()[name]
    except (BackendUnavailable, KeyError) as error:
        reason = "no such plug-in" if isinstance(error, KeyError) else str(error)
        raise pytest.UsageError(f"--backend {name}: {reason}") from None
    provided = operator_names() & set(plug_in.operators)
    automatic, find = dispatch._automatic, dispatch._plug_in
    device = torch.device(min(plug_in.device_types, default="cpu"))

    def choose(operator: str, device_type: str, triton_is_refused: str | None) -> str:
        if operator in provided:
            return name
        return automatic(operator, device_type, triton_is_refused)

    def find_moving(other: str) -> Any:
        plug_in = find(other)
        if other != name or device.type == "cpu":
            return plug_in
        return SimpleNamespace(operators=moving(plug_in.operators, device))

    dispatch._automatic, dispatch._plug_in = choose, find_moving
    dispatch._resolve.cache_clear()
    TESTED = BACKENDS[0] = "auto"
    kept = ", ".join(sorted(operator_names() - provided)) or "none"
    return f"backend {name} on {device}; operators that it lacks, on auto: {kept}"


def moving(
    operators: Mapping[str, Callable[..., Any]], device: torch.device
) -> dict[str, Callable[..., Any]]:
    """Functions that run these on a device, whatever device their arguments are on."""
    return {name: functools.partial(_run_on, device, run) for name, run in operators.items()}


def _run_on(device: torch.device, run: Callable[..., Any], *args: Any, **options: Any) -> Any:
    copies: dict[int, tuple[UntypedStorage, UntypedStorage]] = {}  # views share a copy too
    homes: list[torch.device] = []

    def there(x: Tensor) -> Tensor:
        homes.append(x.device)
        mine = x.untyped_storage()
        if mine.data_ptr() not in copies:
            copies[mine.data_ptr()] = mine, mine.clone().to(device=device)
        return _view(x, copies[mine.data_ptr()][1])

    args, options = tree_map_only(Tensor, there, (args, options))
    result = run(*args, **options)
    for mine, copy in copies.values():  # what the function wrote
        mine.copy_(copy)
    home = homes[0]
    return tree_map_only(
        Tensor, lambda x: _view(x, x.untyped_storage().clone().to(device=home)), result
    )


def _view(x: Tensor, storage: UntypedStorage) -> Tensor:
    """`x` on a storage with the same bytes."""
    empty = torch.empty(0, dtype=x.dtype, device=storage.device)
    return empty.set_(storage, x.storage_offset(), x.shape, x.stride())
