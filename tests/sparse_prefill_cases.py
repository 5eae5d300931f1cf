"""Sparse prefill calls with everything that may be hostile, and the same in double precision.

Rows of kv that no valid entry names hold NaN, invalid entries are drawn from the worst integers,
queries, keys and lists are slices of larger tensors. Interpreter and GPU run the same cases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model1.ops.sparse_prefill import sparse_prefill
from model1.testing.compare import EPS, assert_close_rows, delta_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cannot multiply 16-bit numbers.
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
INVALID = (INT_MIN, -123456, -1, 114514, 1919810, 2147480000, INT_MAX)
SINKS = (math.inf, -math.inf, 0.5, -3.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a call looks like; the numbers are drawn."""

    t: int = 4
    h: int = 3
    s: int = 40
    topk: int = 20
    d: int = 48
    value_dim: int = 32
    has_length: bool = True
    has_sink: bool = True


def make_arguments(shape: Shape, *, dtype: torch.dtype = DTYPE) -> dict[str, Any]:
    """Keyword arguments of `sparse_prefill`; about one entry in five is invalid."""
    t, s, topk = shape.t, shape.s, shape.topk
    q = torch.randn(t, shape.h, shape.d).clamp(-1, 1)
    index = torch.randint(0, max(s, 1), (t, topk), dtype=torch.int32)
    invalid = torch.tensor((*INVALID, s), dtype=torch.int32)
    drawn = invalid[torch.randint(len(invalid), (t, topk))]
    index = torch.where(torch.rand(t, topk) < (0.2 if s else 1.0), drawn, index)
    length = torch.randint(topk + 1, (t,), dtype=torch.int32)
    if t:
        length[0] = random.choice([0, 1, topk])
    kv = torch.full((s, shape.d), math.nan)
    is_valid = valid_entries(index, length if shape.has_length else None, s)
    named = index[is_valid].long()
    kv[named] = (torch.randn(s, shape.d) / 2)[named]
    sink = torch.tensor([random.choice(SINKS) for _ in range(shape.h)])
    return {
        "q": with_slack(q.to(DEVICE, dtype)), "kv": with_slack(kv.to(DEVICE, dtype)),
        "topk_indices": with_slack(index.to(DEVICE)),
        "topk_length": length.to(DEVICE) if shape.has_length else None,
        "attn_sink": sink.to(DEVICE) if shape.has_sink else None,
        "value_dim": shape.value_dim, "softmax_scale": shape.d**-0.5, "empty_lse": math.inf,
    }  # fmt: skip


def with_gradients(arguments: dict[str, Any], **options: Any) -> list[Tensor]:
    """out, max_logits, lse and the gradients of q, kv and the sink, if there is one."""
    names = ["q", "kv"] + ["attn_sink"] * (arguments["attn_sink"] is not None)
    leaves = {name: arguments[name].detach().requires_grad_() for name in names}
    results = sparse_prefill(**arguments | leaves | options)
    # equal rows get equal gradients, whatever their place
    dout = torch.linspace(-1, 1, results.out[0].numel()).view(results.out[0].shape)
    dout = dout.to(results.out).expand_as(results.out)
    return [*results, *torch.autograd.grad(results.out, list(leaves.values()), dout)]


def check_empty_lists(arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """Without a key: zeros, -inf, empty_lse, and gradients of zero, though kv is NaN."""
    out, max_logits, lse, *gradients = with_gradients(arguments, **options)
    assert out.shape == (*arguments["q"].shape[:2], arguments["value_dim"])
    assert not out.any()
    assert (max_logits == -math.inf).all()
    assert (lse == arguments["empty_lse"]).all()
    assert len(gradients) == 3
    assert not any(x.any() for x in gradients)


def check_batch_invariance(arguments: dict[str, Any], **options: Any) -> None:
    """A row and the gradient of its query have the same bits with other mates and more padding."""
    t = len(arguments["q"])
    options |= {"deterministic": True}
    arguments["topk_indices"][0, 3:] = -1
    want = with_gradients(arguments, **options)
    for order, more in ((list(range(t))[::-1], 0), ([2, 0, 0], 1), ([1], 100)):
        names = ("q", "topk_indices", "topk_length")
        call = arguments | {
            name: arguments[name][order] for name in names if arguments[name] is not None
        }
        tail = torch.tensor(INVALID).int()[torch.randint(len(INVALID), (len(order), more))]
        index = call["topk_indices"]
        call["topk_indices"] = torch.cat([index, tail.to(index.device)], 1)
        for x, y in zip(with_gradients(call, **options)[:4], want[:4], strict=True):
            assert torch.equal(x, y[order])


def valid_entries(index: Tensor, length: Tensor | None, s: int) -> Tensor:
    is_valid = (index >= 0) & (index < s)
    if length is not None:
        is_valid &= torch.arange(index.shape[1], device=index.device) < length[:, None]
    return is_valid


def with_slack(x: Tensor) -> Tensor:
    """The same values in a slice of a larger tensor."""
    larger = x.new_full([n + 1 for n in x.shape[:-1]] + [x.shape[-1] + 16], 77)
    return larger[tuple(slice(n) for n in x.shape)].copy_(x)


def in_double(arguments: dict[str, Any]) -> dict[str, Any]:
    return arguments | {"q": arguments["q"].double(), "kv": arguments["kv"].double()}


def plain(arguments: dict[str, Any], dout: Tensor) -> dict[str, Tensor]:
    """out and the gradients in PyTorch, which rounds to q's dtype where the formula has to.

    The inputs of every product are in q's dtype: the probabilities and ds get rounded. q_noise:
    what the rounding of out alone does to the rows of q's gradient.
    """
    q, kv, index, value_dim = (arguments[n] for n in ("q", "kv", "topk_indices", "value_dim"))
    scale, sink = arguments["softmax_scale"], arguments["attn_sink"]
    if index.shape[1] == 0:  # nothing has no maximum
        index = index.new_full((len(q), 1), -1)
    is_valid = valid_entries(index, arguments["topk_length"], len(kv))
    keys = q.new_zeros(*index.shape, q.shape[2], dtype=torch.float32)
    keys[is_valid] = kv[index[is_valid].long()].float()
    values = keys[..., :value_dim]
    logits = torch.bmm(q.float(), keys.transpose(1, 2)) * scale
    logits = logits.masked_fill(~is_valid[:, None], -math.inf)
    largest = logits.amax(-1).clamp(min=-1e30)
    p = torch.exp(logits - largest[..., None])
    sink_weight = torch.exp((-math.inf if sink is None else sink) - largest)
    total = p.sum(-1) + sink_weight
    total = total.masked_fill(total == 0, 1.0)[..., None]
    out = (torch.bmm(rounded(p, q), values) / total).to(q.dtype)
    p, dout = p / total, dout.float()
    delta = (dout * out.float()).sum(-1)
    dp = torch.bmm(dout, values.transpose(1, 2))
    ds = rounded(p * (dp - delta[..., None]) * scale, q).masked_fill(~is_valid[:, None], 0.0)
    dkeys = torch.bmm(ds.transpose(1, 2), q.float())
    dkeys[..., :value_dim] += torch.bmm(rounded(p, q).transpose(1, 2), dout)
    dkv = torch.zeros_like(kv, dtype=torch.float32)
    dkv.index_add_(0, index[is_valid].long(), dkeys[is_valid])
    # delta is 0 where the weight of a sink is inf / inf
    dsink = torch.where(delta == 0, 0.0, -sink_weight / total[..., 0] * delta).sum(0)
    dq = torch.bmm(ds, keys).to(q.dtype)
    mean_key = torch.bmm(p, keys).norm(dim=-1)
    noise = delta_noise(out, dout.to(q.dtype), p, dp) * scale * mean_key
    return {"out": out, "q": dq, "kv": dkv.to(q.dtype), "attn_sink": dsink, "q_noise": noise}


def rounded(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).float()


def assert_right(result: tuple[Tensor, Tensor, Tensor], arguments: dict[str, Any]) -> None:
    """The results of a call against double precision; queries without keys to the bit."""
    out, max_logits, lse = result
    want = sparse_prefill(**in_double(arguments), backend="ref")
    assert out.dtype == arguments["q"].dtype
    assert max_logits.dtype == lse.dtype == torch.float32
    assert_close_rows(out, plain(arguments, out)["out"], want.out)
    for got, expected in ((max_logits, want.max_logits), (lse, want.lse)):
        assert_close_rows(got[..., None], expected[..., None], expected[..., None])
    is_empty = want.max_logits == -math.inf
    assert not out[is_empty].any()
    assert (lse[is_empty] == arguments["empty_lse"]).all()


def gradients(arguments: dict[str, Any], dout: Tensor, **options: Any) -> dict[str, Tensor]:
    """Gradients of q, kv and attn_sink, each in its layout, for a gradient of out."""
    names = [n for n in ("q", "kv", "attn_sink") if arguments[n] is not None]
    leaves = {n: arguments[n].detach().requires_grad_() for n in names}
    out = sparse_prefill(**arguments | leaves | options).out
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype))
    return dict(zip(names, grads, strict=True))


def assert_gradients_right(
    arguments: dict[str, Any], *, backend: str = "triton", **options: Any
) -> dict[str, Tensor]:
    """The gradients of a call against double precision; rows that nobody named to the bit."""
    q, kv = arguments["q"], arguments["kv"]
    dout = torch.randn(*q.shape[:2], arguments["value_dim"]).to(q)
    got = gradients(arguments, dout, backend=backend, **options)
    want = gradients(in_double(arguments), dout, backend="ref")
    baseline = plain(arguments, dout)
    for name, grad in got.items():
        assert grad.dtype == arguments[name].dtype
        # the sinks are one row, at times of one number, which PyTorch may have right by chance
        eps = max(EPS, torch.finfo(q.dtype).eps) if name == "attn_sink" else EPS
        noise = baseline["q_noise"] if name == "q" else 0.0
        assert_close_rows(grad, baseline[name], want[name], eps=eps, noise=noise)
    is_valid = valid_entries(arguments["topk_indices"], arguments["topk_length"], len(kv))
    is_named = torch.zeros(len(kv), dtype=torch.bool, device=kv.device)
    is_named[arguments["topk_indices"][is_valid].long()] = True
    assert not got["kv"][~is_named].any()
    return got


def check_random_case(
    number: int, dims: list[tuple[int, int]],
    call: Callable[[dict[str, Any]], tuple[Tensor, Tensor, Tensor]] | None = None,
    **choices: list[int],
) -> None:  # fmt: skip
    """Draw a call from its number, run it and compare; the message names the number.

    call: what runs it, forward alone, if not the portable kernel; a sink comes with lengths then,
    for each combination is a compilation.
    """
    random.seed(number)
    torch.manual_seed(number)
    d, value_dim = random.choice(dims)
    has_length, has_sink = random.random() < 0.5, random.random() < 0.5
    shape = Shape(
        d=d, value_dim=value_dim, has_length=has_length,
        has_sink=has_sink if call is None else has_length,
        **{name: random.choice(values) for name, values in choices.items()},
    )  # fmt: skip
    try:
        arguments = make_arguments(shape)
        if call is not None:
            assert_right(call(arguments), arguments)
            return
        assert_right(sparse_prefill(**arguments, backend="triton"), arguments)
        if number % 2 or DEVICE == "cuda":  # interpreted, every gradient would take too long
            assert_gradients_right(arguments, deterministic=number % 4 == 3)
    except AssertionError as error:
        raise AssertionError(f"case {number}, {shape}: {error}") from error
