"""What the hyper-connection operators accept; the kernels trust it."""

from __future__ import annotations

from torch import Tensor, bfloat16, float16, float32

from model1.errors import BackendUnavailable

MAX_KERNEL_STREAMS = 8  # a token's matrix and its sums lie in registers
_KERNEL_DTYPES = (bfloat16, float16, float32)


def usable(backend: str, x: Tensor) -> str:
    """`backend`, or "ref" for "auto" where a GPU's kernels do not take such streams."""
    if backend != "auto" or not x.is_cuda or x.dim() != 3:
        return backend
    takes = x.dtype in _KERNEL_DTYPES and x.shape[1] <= MAX_KERNEL_STREAMS
    return backend if takes else "ref"


def check_sizes(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, iters: int) -> None:
    """Raise ValueError for parameters of `mhc_coefficients` that do not fit the streams."""
    if x.dim() != 3:
        raise ValueError(f"x must be [t, n, c], got {list(x.shape)}")
    _, n, c = x.shape
    width = n * n + 2 * n
    if phi.shape != (width, n * c):
        raise ValueError(f"phi must be [{width}, {n * c}], got {list(phi.shape)}")
    if scale.shape != (width,) or bias.shape != (width,):
        got = f"{list(scale.shape)} and {list(bias.shape)}"
        raise ValueError(f"scale and bias must be [{width}], got {got}")
    if iters < 1:
        raise ValueError(f"iters must be at least 1, got {iters}")


def check_head(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor) -> None:
    """The same for `mhc_head`."""
    if x.dim() != 3:
        raise ValueError(f"x must be [t, n, c], got {list(x.shape)}")
    n, c = x.shape[1], x.shape[2]
    if phi.shape != (n, n * c):
        raise ValueError(f"phi must be [{n}, {n * c}], got {list(phi.shape)}")
    if scale.shape != (1,) or bias.shape != (n,):
        got = f"{list(scale.shape)} and {list(bias.shape)}"
        raise ValueError(f"scale and bias must be [1] and [{n}], got {got}")


def check_coefficients(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor) -> None:
    """The same for what else breaks the contract, which costs a step on the CPU too much to ask."""
    _check_streams(x)
    for name, tensor in (("phi", phi), ("scale", scale), ("bias", bias)):
        _check_device(name, tensor, x)


def check_collapse(x: Tensor, pre: Tensor) -> None:
    """Raise ValueError for the first argument of `mhc_collapse` that breaks the contract."""
    _check_streams(x)
    _check_weights("pre", pre, x, x.shape[:2])


def check_write_back(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> None:
    """The same for `mhc_write_back`."""
    _check_streams(x)
    t, n, c = x.shape
    _check_weights("y", y, x, (t, c))
    _check_weights("post", post, x, (t, n))
    _check_weights("comb", comb, x, (t, n, n))


def check_norm(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError for a norm's weight that does not fit the streams."""
    _check_weights("weight", weight, x, x.shape[2:])


def check_kernel_streams(x: Tensor) -> None:
    """Raise for streams that the Triton kernels do not take."""
    if x.dtype not in _KERNEL_DTYPES:
        raise ValueError(f"x must be bfloat16, float16 or float32, got {x.dtype}")
    if x.shape[1] > MAX_KERNEL_STREAMS:
        rule = f"takes at most {MAX_KERNEL_STREAMS} streams, got {x.shape[1]}"
        raise BackendUnavailable(f"mhc/triton {rule}")


def _check_streams(x: Tensor) -> None:
    if x.dim() != 3 or x.shape[1] == 0 or x.shape[2] == 0 or not x.is_floating_point():
        raise ValueError(f"x must be [t, n, c] floating point, got {list(x.shape)} {x.dtype}")


def _check_weights(name: str, weights: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    if weights.shape != shape or not weights.is_floating_point():
        got = f"{list(weights.shape)} {weights.dtype}"
        raise ValueError(f"{name} must be {list(shape)} floating point, got {got}")
    _check_device(name, weights, x)


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
