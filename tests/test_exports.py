from __future__ import annotations

import subprocess
import sys

import pytest

import model1


def test_all_is_sorted() -> None:
    assert model1.__all__ == sorted(model1.__all__)


@pytest.mark.parametrize("name", model1.__all__)
def test_every_public_name_is_importable(name: str) -> None:
    value = getattr(model1, name)
    assert value.__name__ in (name, f"model1.{name}")
    assert name in dir(model1)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Modell'"):
        model1.Modell  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, model1; print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["False", "False"]
