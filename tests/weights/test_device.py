from __future__ import annotations

import resource

import pytest
import torch

from model1.errors import DeviceError
from model1.weights import device
from model1.weights.device import check_fit, default_dtype, resolve_device

CPU = torch.device("cpu")


def test_cpu_and_its_dtype() -> None:
    assert resolve_device("cpu") == CPU
    assert default_dtype(CPU) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("name", ["gpu0", "cuda:x", "", "meta", "mps"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DeviceError, match="'cpu'"):
        resolve_device(name)


def test_absent_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device cuda is absent: this machine has 0 CUDA devices"):
        resolve_device("cuda")


def test_gpu_number_out_of_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match="device cuda:2 is absent: this machine has 2"):
        resolve_device("cuda:2")


def test_fit() -> None:
    check_fit(1000, CPU)
    with pytest.raises(DeviceError, match=r"needs about 1000000000\.00 GB on cpu, .* GB are free"):
        check_fit(10**18, CPU)


def test_address_space_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_available_ram_bytes", lambda: None)
    check_fit(10**18, CPU)  # nothing known, nothing refused
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, 1000))
    with pytest.raises(DeviceError, match=r"0\.00 GB are free"):
        check_fit(1, CPU)
