"""Rules that hold for every test: hermetic environment, one thread, poisoned memory, markers."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from backend_option import use_backend

# Filled with NaN (or the largest integer) when code under this prefix asks for unset memory.
POISONED = "model1.ops"
_KEPT_GPU_BYTES = 1 << 30
BACKEND_LINE = pytest.StashKey[str]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--backend", help="test this backend plug-in: see docs/backends.md")


def pytest_configure(config: pytest.Config) -> None:
    for name in list(os.environ):
        if name.startswith("MODEL1_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    # Two test workers with one thread each are faster than two that fight for the same cores;
    # the variables reach the processes that tests start.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A warm kernel cache hides compilation errors: every run starts with an empty one. Processes
    # that share a run may share it: SHARED_TRITON_CACHE is a folder that their parent made for it.
    cache = os.environ.get("SHARED_TRITON_CACHE") or tempfile.mkdtemp(prefix="model1-triton-")
    os.environ["TRITON_CACHE_DIR"] = cache
    # Triton reads this where a kernel is defined: without a GPU its kernels run interpreted.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    if name := config.getoption("--backend"):
        config.stash[BACKEND_LINE] = use_backend(name)


def pytest_report_header(config: pytest.Config) -> str | None:
    return config.stash.get(BACKEND_LINE, None)


@pytest.hookimpl(tryfirst=True)  # before `-m gpu` deselects what is not marked yet
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, torch.cuda.is_available() is False")
    no_triton = pytest.mark.skip(reason="needs Triton, which is not installed")
    not_slow = pytest.mark.skip(reason="slow: run with --slow, as `make test` does")
    other = pytest.mark.skip(reason="of a built-in backend, --backend names another one")
    has_gpu = torch.cuda.is_available()
    has_triton = importlib.util.find_spec("triton") is not None
    for item in items:
        if "any_device" in item.keywords and has_gpu:
            item.add_marker("gpu")
        if "gpu" in item.keywords and not has_gpu:
            item.add_marker(no_gpu)
        if "triton" in item.keywords and not has_triton:
            item.add_marker(no_triton)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(not_slow)
        is_built_in = {"triton", "built_in"} & set(item.keywords)
        if config.getoption("--backend") and (is_built_in or item.path.stem.endswith("_kernel")):
            item.add_marker(other)


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Overwrite unset memory with values that no correct result contains."""
    with torch.no_grad():
        if tensor.is_floating_point() and tensor.element_size() == 1:
            tensor.view(torch.uint8).fill_(0xFF)  # NaN in e4m3, e5m2 and e8m0 alike
        elif tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        elif tensor.dtype != torch.bool:
            tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(tensor) if caller.startswith(POISONED) else tensor

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that leaves one element of its output unwritten fails its test."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoning(getattr(torch.Tensor, name)))


@pytest.fixture(autouse=True)
def torch_state() -> Iterator[None]:
    """Every test starts from the same seed and leaves the global defaults as it found them."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(1)
    # processes that share the tests share the GPU: none keeps what one large test has needed
    if torch.cuda.is_available() and torch.cuda.memory_reserved() > _KEPT_GPU_BYTES:
        torch.cuda.empty_cache()
