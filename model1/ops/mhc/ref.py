"""Plain PyTorch manifold-constrained hyper-connections.

Where a CPU records no gradient the Sinkhorn rounds run in NumPy: a few tokens cost only the number
of calls, and there are dozens of them in every sublayer.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model1.ops.norm.ref import normalise, over_rms
from model1.ops.ragged import counts_calls


def sinkhorn_ref(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """See `model1.ops.mhc.sinkhorn`."""
    comb = torch.softmax(logits, dim=-1)
    if logits.dtype == torch.float32 and counts_calls(logits):
        return torch.from_numpy(_sinkhorn_rounds(comb.numpy(), iters, eps))
    comb = comb + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return comb


def _sinkhorn_rounds(softmax: np.ndarray, iters: int, eps: float) -> np.ndarray:
    """The same rounds on [t, n, n] fp32, each sum starting from eps.

    Tokens lie last meanwhile: sums over either other axis add whole rows of them.
    """
    if len(softmax) == 1:  # NumPy adds up a lone token in another order
        return _sinkhorn_rounds(np.concatenate([softmax, softmax]), iters, eps)[:1]
    comb = np.ascontiguousarray(softmax.transpose(1, 2, 0))
    comb = comb + np.float32(eps)
    n, _, t = comb.shape
    columns, rows = np.empty((1, n, t), np.float32), np.empty((n, 1, t), np.float32)
    start, add_up = np.float32(eps), np.add.reduce
    for i in range(2 * iters - 1):
        sums = rows if i % 2 else columns
        # axis, dtype, out, keepdims, initial: by name they would cost a tenth more
        np.divide(comb, add_up(comb, i % 2, None, sums, True, start), comb)
    return np.ascontiguousarray(comb.transpose(2, 0, 1))


def mhc_coefficients_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See `model1.ops.mhc.mhc_coefficients`."""
    n = x.shape[1]
    z = _scaled_product(x, phi, scale, bias, norm_eps)
    pre, post, comb = z.split_with_sizes((n, n, n * n), dim=-1)
    pre, post = torch.sigmoid(pre) + eps, 2.0 * torch.sigmoid(post)
    return pre, post, sinkhorn_ref(comb.view(-1, n, n), iters=iters, eps=eps)


def mhc_coefficients_backward_ref(
    d_pre: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, saved: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, phi, scale and bias.

    saved: what a backend's forward returned behind the coefficients, here nothing.
    """
    n = x.shape[1]
    flat, weight, factor = x.flatten(1).float(), phi.float(), scale.float()
    rstd = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    z = F.linear(flat, weight) * rstd
    logits = torch.addcmul(bias.float(), z, factor)
    weights = torch.sigmoid(logits[:, : 2 * n])
    d_weights = torch.cat([d_pre, 2.0 * d_post], dim=-1) * weights * (1.0 - weights)
    d_comb = _sinkhorn_backward(d_comb, logits[:, 2 * n :].view(-1, n, n), iters, eps)
    d_logits = torch.cat([d_weights, d_comb.flatten(1)], dim=-1)
    d_product = d_logits * factor * rstd
    along = (d_product * z).sum(dim=-1, keepdim=True) * rstd / flat.shape[1]
    d_x = (d_product @ weight - along * flat).view(x.shape)
    d_scale, d_bias = (d_logits * z).sum(dim=0), d_logits.sum(dim=0)
    d_phi = d_product.mT @ flat
    return d_x.type_as(x), d_phi.type_as(phi), d_scale.type_as(scale), d_bias.type_as(bias)


def _sinkhorn_backward(grad: Tensor, logits: Tensor, iters: int, eps: float) -> Tensor:
    """Gradient of the logits from that of `sinkhorn_ref`'s result."""
    softmax = torch.softmax(logits, dim=-1)
    comb, steps = softmax + eps, []
    for i in range(2 * iters - 1):
        dim = -1 if i % 2 else -2
        total = comb.sum(dim=dim, keepdim=True) + eps
        comb = comb / total
        steps.append((dim, total, comb))
    for dim, total, comb in reversed(steps):
        grad = (grad - (grad * comb).sum(dim=dim, keepdim=True)) / total
    return softmax * (grad - (grad * softmax).sum(dim=-1, keepdim=True))


def mhc_head_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, *, eps: float, norm_eps: float
) -> Tensor:
    """See `model1.ops.mhc.mhc_head`."""
    return torch.sigmoid(_scaled_product(x, phi, scale, bias, norm_eps)) + eps


def mhc_head_backward_ref(
    d_pre: Tensor, x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, saved: Tensor, *,
    eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, phi, scale and bias; saved as in `mhc_coefficients_backward_ref`."""
    flat, weight, factor = x.flatten(1).float(), phi.float(), scale.float()
    rstd = torch.rsqrt(flat.square().mean(dim=-1, keepdim=True) + norm_eps)
    z = F.linear(flat, weight) * rstd
    gate = torch.sigmoid(torch.addcmul(bias.float(), z, factor))
    d_logits = d_pre * gate * (1.0 - gate)
    d_product = d_logits * factor * rstd
    along = (d_product * z).sum(dim=-1, keepdim=True) * rstd / flat.shape[1]
    d_x = (d_product @ weight - along * flat).view(x.shape)
    d_scale, d_bias = (d_logits * z).sum().view(1), d_logits.sum(dim=0)
    d_phi = d_product.mT @ flat
    return d_x.type_as(x), d_phi.type_as(phi), d_scale.type_as(scale), d_bias.type_as(bias)


def _scaled_product(x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, norm_eps: float) -> Tensor:
    """scale * (phi flat(x)) / rms(flat(x)) + bias, one row a token."""
    flat = x.flatten(1).float()
    # Multiplying before dividing by the rms gives the same numbers for one pass less.
    z = over_rms(F.linear(flat, phi.float()), flat, norm_eps)
    return torch.addcmul(bias.float(), z, scale.float())


def mhc_collapse_ref(x: Tensor, pre: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_collapse`."""
    weights = pre.type_as(x)
    if x.is_cpu:
        return torch.bmm(weights.unsqueeze(1), x).squeeze(1)
    return (weights.unsqueeze(-1) * x).sum(dim=1)


def mhc_collapse_backward_ref(grad: Tensor, x: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and pre."""
    wide = grad.float().unsqueeze(1)
    d_x, d_pre = pre.float().unsqueeze(-1) * wide, (wide * x.float()).sum(dim=-1)
    return d_x.type_as(x), d_pre.type_as(pre)


def mhc_write_back_ref(x: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """See `model1.ops.mhc.mhc_write_back`."""
    out = post.type_as(x).unsqueeze(-1) * y.unsqueeze(1)
    if x.is_cpu:
        return torch.baddbmm(out, comb.type_as(x).mT, x)
    # Unrolled over the few input streams: a GPU is slow at products this thin.
    weights = comb.type_as(x).unsqueeze(-1)
    for j in range(x.shape[1]):
        out = torch.addcmul(out, weights[:, j], x[:, j].unsqueeze(1))
    return out


def mhc_write_back_backward_ref(
    grad: Tensor, x: Tensor, y: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, y, post and comb."""
    wide = grad.float()
    d_x, d_comb = comb.float() @ wide, x.float() @ wide.mT
    d_y = (post.float().unsqueeze(1) @ wide).squeeze(1)
    d_post = (wide @ y.float().unsqueeze(-1)).squeeze(-1)
    return d_x.type_as(x), d_y.type_as(y), d_post.type_as(post), d_comb.type_as(comb)


def mhc_collapse_norm_ref(x: Tensor, pre: Tensor, weight: Tensor, *, norm_eps: float) -> Tensor:
    """See `model1.ops.mhc.chain.mhc_collapse_norm`; u alone."""
    return normalise(mhc_collapse_ref(x, pre), weight, norm_eps)


def mhc_collapse_norm_backward_ref(
    grad: Tensor, passed: Tensor | None, x: Tensor, pre: Tensor, weight: Tensor, *, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, pre and weight from that of u and, added to the first, of x passed on."""
    streams, wide = x.float(), grad.float()
    collapsed = (pre.float().unsqueeze(-1) * streams).sum(dim=1)
    rstd = torch.rsqrt(collapsed.square().mean(dim=-1, keepdim=True) + norm_eps)
    normed, scaled = collapsed * rstd, wide * weight.float()
    along = (scaled * normed).mean(dim=-1, keepdim=True)
    d_collapsed = ((scaled - along * normed) * rstd).unsqueeze(1)
    d_x = pre.float().unsqueeze(-1) * d_collapsed
    d_x = d_x if passed is None else d_x + passed.float()
    d_pre, d_weight = (d_collapsed * streams).sum(dim=-1), (wide * normed).sum(dim=0)
    return d_x.type_as(x), d_pre.type_as(pre), d_weight.type_as(weight)


def mhc_write_back_collapse_norm_ref(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, pre: Tensor, weight: Tensor, *,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.mhc.single_pass.mhc_write_back_collapse_norm`."""
    out = mhc_write_back_ref(x, y, post, comb)
    return mhc_collapse_norm_ref(out, pre, weight, norm_eps=norm_eps), out


def mhc_write_back_collapse_norm_backward_ref(
    grad: Tensor, passed: Tensor | None, x: Tensor, y: Tensor, post: Tensor, comb: Tensor,
    pre: Tensor, weight: Tensor, out: Tensor, *, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the six tensors from that of u' and, unless None, that of x', which is out."""
    total, d_pre, d_weight = mhc_collapse_norm_backward_ref(
        grad, passed, out, pre, weight, norm_eps=norm_eps
    )
    return *mhc_write_back_backward_ref(total, x, y, post, comb), d_pre, d_weight


def mhc_enter_ref(
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """u, post and comb of `model1.ops.mhc.chain.mhc_enter`; and, the fourth, `pre`."""
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    pre, post, comb = mhc_coefficients_ref(x, phi, scale, bias, **options)
    return mhc_collapse_norm_ref(x, pre, weight, norm_eps=norm_eps), post, comb, pre


def mhc_enter_backward_ref(
    passed: Tensor | None, d_u: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, phi: Tensor, scale: Tensor, bias: Tensor, weight: Tensor, pre: Tensor,
    saved: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the five tensors that the forward takes; passed: that of x passed on.

    pre: what it returned fourth; saved: what a backend's forward returned behind it, here nothing.
    """
    total, d_pre, d_weight = mhc_collapse_norm_backward_ref(
        d_u, passed, x, pre, weight, norm_eps=norm_eps
    )
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    through, *parameters = mhc_coefficients_backward_ref(
        d_pre, d_post, d_comb, x, phi, scale, bias, saved, **options
    )
    return (total.float() + through.float()).type_as(x), *parameters, d_weight


def mhc_seam_ref(
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, *, iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `model1.ops.mhc.chain.mhc_seam`; and, the fifth, the new `pre`."""
    out = mhc_write_back_ref(x, y, post, comb)
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    return out, *mhc_enter_ref(out, phi, scale, bias, weight, **options)


def mhc_seam_backward_ref(
    d_out: Tensor, d_u: Tensor, d_post: Tensor, d_comb: Tensor,
    x: Tensor, y: Tensor, post: Tensor, comb: Tensor, phi: Tensor, scale: Tensor, bias: Tensor,
    weight: Tensor, out: Tensor, pre: Tensor, saved: Tensor, *,
    iters: int, eps: float, norm_eps: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of the eight tensors that the forward takes, in its order.

    out, pre: what it returned first and fifth; saved: what a backend's forward returned behind
    them, here nothing.
    """
    options = {"iters": iters, "eps": eps, "norm_eps": norm_eps}
    total, *parameters = mhc_enter_backward_ref(
        d_out, d_u, d_post, d_comb, out, phi, scale, bias, weight, pre, saved, **options
    )
    return *mhc_write_back_backward_ref(total, x, y, post, comb), *parameters
