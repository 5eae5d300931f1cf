"""FlashMLA, as the public vllm wheel carries it, importable without vllm.

    python -m benchmarks.peers.flash_mla        # prints what to put in front of a benchmark

FlashMLA has no package of its own on the index. The wheel of vllm 0.24.0, built for PyTorch 2.11
and CUDA 13, holds its compiled extension and its Python interface; the two are unpacked into the
git-ignored folder .data/peers, with empty packages around them. Needs pip and the package index.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".data" / "peers"
REQUIREMENT = "vllm==0.24.0"
EXTENSION = "vllm/_flashmla_C.abi3.so"
INTERFACE = "vllm/third_party/flashmla/"
MODULE = "vllm.third_party.flashmla.flash_mla_interface"
_EMPTY = ("vllm/__init__.py", "vllm/third_party/__init__.py")
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")


def download(folder: Path) -> Path:
    """The wheel, without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--only-binary=:all:", "--python-version", "3.12", "--abi", "abi3"]
    command += [part for name in _PLATFORMS for part in ("--platform", name)]
    subprocess.run([*map(str, command), REQUIREMENT], check=True)
    (wheel,) = folder.glob("vllm-*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """The extension and its interface, as packages that import nothing else of vllm.

    Raises ValueError for a wheel that lacks them.
    """
    with zipfile.ZipFile(wheel) as archive:
        names = [
            name
            for name in archive.namelist()
            if name == EXTENSION or (name.startswith(INTERFACE) and name.endswith(".py"))
        ]
        if EXTENSION not in names or len(names) < 2:
            raise ValueError(f"{wheel.name} must hold {EXTENSION} and {INTERFACE}*.py, has {names}")
        archive.extractall(folder, names)
    for name in _EMPTY:
        (folder / name).touch()


def main() -> None:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--wheel", type=Path, help="one that is here already")
    options = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.wheel or download(Path(folder)), FOLDER)
    print(f"PYTHONPATH={FOLDER} python -m benchmarks.run --peer {MODULE}")


if __name__ == "__main__":
    main()
