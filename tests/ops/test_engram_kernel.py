"""Engram's kernels: the formulas in fp64, every code, hostile rows and ids, PyTorch's view."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from backend_option import BACKENDS
from torch import Tensor

from model1.config import EngramConfig
from model1.errors import BackendUnavailable
from model1.ops.engram import (
    RowStore,
    build_hash_specs,
    engram_gate,
    engram_hash,
    quantize_rows,
)
from model1.ops.engram.gather import gather_rows
from model1.ops.engram.ref import engram_gate_backward_ref, engram_gate_ref
from model1.testing.compare import assert_close_rows

pytest.importorskip("triton", reason="needs Triton: `make test` installs it on Linux x86_64")

from model1.ops.engram.portable import Config, engram_gate_backward_triton

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [  # t, n, d
    (1, 1, 16),
    (3, 4, 64),
    (5, 3, 100),
    (2, 8, 48),
    (2, 2, 2064),
    (2, 5, 7),
]
if torch.cuda.is_available():
    SHAPES += [(301, 4, 4096), (130, 1, 7168), (65, 8, 2560), (70001, 2, 16)]
VARIANTS = [  # dtype, signed_sqrt
    (torch.float32, True),
    (torch.bfloat16, True),
    (torch.float32, False),
    (torch.bfloat16, False),
    (torch.float16, True),
]
KINDS: list[Any] = ["bf16", "fp8", "fp4"]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def numpy_like_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of overflow and NaN; a GPU does not."""
    with np.errstate(over="ignore", invalid="ignore"):
        yield


def gate_inputs(t: int, n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """h, key, value and norm_weight; key and value lie in one projection, as in the model."""
    joint = torch.randn(t, n + 1, d).to(DEVICE, dtype)
    weight = 1 + 0.3 * torch.randn(n, d)
    return [torch.randn(t, n, d).to(DEVICE, dtype), joint[:, :-1], joint[:, -1], weight.to(DEVICE)]


def plain_gate(
    h: Tensor, key: Tensor, value: Tensor, weight: Tensor, eps: float, signed_sqrt: bool
) -> tuple[Tensor, Tensor]:
    """What PyTorch does without kernels, products in the dtype of h."""
    h_hat = h * (h.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    key_hat = key * (key.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    score = (h_hat.to(h) * weight.to(h) * key_hat.to(h)).float().sum(-1) / h.shape[-1] ** 0.5
    if signed_sqrt:
        score = score.sign() * score.abs().clamp(min=1e-6).sqrt()
    gate = score.sigmoid()
    return gate[..., None].to(h) * value[:, None], gate


def gradients(run: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Results and gradients of a call on these inputs, which keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run(*leaves)
    grads = [grad.to(x) for grad, x in zip(grads, results, strict=True)]
    return [x.detach() for x in (*results, *torch.autograd.grad(results, leaves, grads))]


@pytest.mark.parametrize("number", range(len(SHAPES) * (1 if DEVICE == "cpu" else len(VARIANTS))))
def test_gate_and_gradients_equal_the_formula(number: int) -> None:
    shape, (dtype, signed_sqrt) = SHAPES[number % len(SHAPES)], VARIANTS[number % len(VARIANTS)]
    inputs = gate_inputs(*shape, dtype)
    grads = [torch.randn(shape).to(DEVICE, dtype), torch.randn(shape[:2]).to(DEVICE)]
    options = {"eps": 1e-6, "signed_sqrt": signed_sqrt}

    def kernel(*x: Tensor) -> tuple[Tensor, Tensor]:
        return engram_gate(*x, **options, backend="triton")

    def oracle(*x: Tensor) -> tuple[Tensor, Tensor]:
        return engram_gate(*x, **options, backend="ref")

    got = gradients(kernel, inputs, grads)
    baseline = gradients(lambda *x: plain_gate(*x, **options), inputs, grads)
    expected = gradients(oracle, [x.double() for x in inputs], grads)
    for i, (x, base, y) in enumerate(zip(got, baseline, expected, strict=True)):
        assert x.dtype == [dtype, torch.float32, *(z.dtype for z in inputs)][i]
        if dtype == torch.float32 or i == 1:  # in fp32, where the root magnifies what s is off by
            torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=2e-5)
        else:
            assert_close_rows(x, base, y, eps=2e-3)


def test_bf16_is_fp32_arithmetic_rounded_once() -> None:
    h, key, value, weight = gate_inputs(9, 4, 64, torch.bfloat16)
    out, gate = engram_gate(h, key, value, weight, eps=1e-20, backend="triton")
    wide, same = engram_gate(
        h.float(), key.float(), value.float(), weight, eps=1e-20, backend="triton"
    )
    torch.testing.assert_close(gate, same, rtol=1e-6, atol=0)
    assert torch.equal(out, (gate[..., None] * value.float()[:, None]).to(torch.bfloat16))
    torch.testing.assert_close(wide, out.float(), rtol=2**-8, atol=1e-6)


def test_the_weights_gradient_is_the_sum_over_all_parts() -> None:
    inputs, grad = gate_inputs(11, 2, 24), torch.randn(11, 2, 24).to(DEVICE)
    _, gate, scores = engram_gate_ref(*inputs, None, 1e-6, True)
    want = engram_gate_backward_ref(grad, None, *inputs, gate, scores, True)
    for tokens_per_sum in (4, 8, 16):
        config = Config(tokens_per_sum=tokens_per_sum, channels=16)
        got = engram_gate_backward_triton(grad, None, *inputs, gate, scores, True, config)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("t", [0, 1, 5])
def test_dead_tokens_pass_nothing(t: int) -> None:
    inputs = gate_inputs(t, 3, 32)
    live = torch.tensor([True, False, True, False, True])[:t].to(DEVICE)
    grads = [torch.randn(t, 3, 32).to(DEVICE), torch.randn(t, 3).to(DEVICE)]

    def run(mask: Tensor | None, backend: str) -> list[Tensor]:
        return gradients(
            lambda *x: engram_gate(*x, eps=1e-6, live=mask, backend=backend), inputs, grads
        )

    got, everything = run(live, "triton"), run(None, "triton")
    for x, y, z in zip(got[:-1], everything[:-1], run(live, "ref")[:-1], strict=True):
        assert torch.equal(x[live], y[live])
        assert (x[~live] == 0).all()
        torch.testing.assert_close(x, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[-1], run(live, "ref")[-1], rtol=1e-4, atol=1e-5)
    assert t > 0 or (got[-1] == 0).all()


def test_tokens_do_not_depend_on_each_other() -> None:
    inputs, order = gate_inputs(7, 3, 48), torch.randperm(7).to(DEVICE)
    grads = [torch.randn(7, 3, 48).to(DEVICE), torch.randn(7, 3).to(DEVICE)]

    def run(rows: Tensor | slice, weight: Tensor) -> list[Tensor]:
        some = [x[rows] for x in inputs[:3]]
        return gradients(
            lambda *x: engram_gate(*x, eps=1e-6, backend="triton"),
            [*some, weight],
            [x[rows] for x in grads],
        )

    want, weight = run(slice(None), inputs[3]), inputs[3]
    for rows in (order, slice(5, 6), slice(3, 7)):
        for got, all_rows in zip(run(rows, weight)[:-1], want[:-1], strict=True):
            assert torch.equal(got, all_rows[rows])
    assert torch.equal(run(slice(None), weight)[-1], want[-1])
    inputs[1][5, 2, 7] = math.nan
    bad = run(slice(None), weight)
    assert bad[0].isnan().flatten(2).all(2).nonzero().tolist() == [[5, 2]]
    assert torch.equal(bad[0][6:], want[0][6:])
    for got, good in zip(bad[2:5], want[2:5], strict=True):  # h, key, value
        assert got[5].isnan().any()
        assert torch.equal(got[6:], good[6:])


def test_no_gradient_passes_a_clamped_score() -> None:
    h, key, value, weight = gate_inputs(4, 2, 16)
    key = key.clone()
    eye = torch.eye(16).to(DEVICE)
    h[0], key[0] = eye[:2], eye[2:4]  # s = 0
    h[1], key[1] = eye[:2], eye[2:4] + 1e-7 * eye[:2]  # s below 1e-6
    h[2] = 0
    grads = [torch.ones(4, 2, 16).to(DEVICE), torch.zeros(4, 2).to(DEVICE)]
    _, gate, d_h, d_key, d_value, d_weight = gradients(
        lambda *x: engram_gate(*x, eps=1e-20, backend="triton"), [h, key, value, weight], grads
    )
    half = torch.full((2,), 0.5, device=DEVICE)
    torch.testing.assert_close(gate[0], half, rtol=0, atol=0)
    torch.testing.assert_close(gate[1], half + 1e-3 / 4, rtol=1e-6, atol=0)
    for grad in (d_h, d_key):
        assert (grad[:3] == 0).all()
        assert (grad[3].abs().sum(-1) > 0).all()
    torch.testing.assert_close(d_value[0], torch.ones(16).to(DEVICE))
    assert d_weight.isfinite().all()


def test_operators_describe_themselves_to_pytorch() -> None:
    leaves = [x.detach().requires_grad_() for x in gate_inputs(2, 3, 16)]
    live = torch.tensor([True, False]).to(DEVICE)
    forward = torch.ops.model1.engram_gate.default
    torch.library.opcheck(forward, (*leaves, live, 1e-6, True, "triton"))
    inputs = [x.detach() for x in leaves]
    out, gate, scores = engram_gate_ref(*inputs, live, 1e-6, True)
    backward = torch.ops.model1.engram_gate_backward.default
    torch.library.opcheck(backward, (out, gate, *inputs, gate, scores, True, "triton"))
    store, rows = quantize_rows(torch.randn(5, 32), "fp4").to(DEVICE), torch.arange(3).to(DEVICE)
    gather = torch.ops.model1.engram_gather.default
    torch.library.opcheck(gather, (store.data, store.scale, rows, torch.bfloat16, "triton"))
    hash_op = torch.ops.model1.engram_hash.default
    torch.library.opcheck(hash_op, (*hash_arguments(4)[:5], 2, "triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_graph_under_torch_compile(backend: str) -> None:
    def step(*x: Tensor) -> Tensor:
        out, gate = engram_gate(2 * x[0], *x[1:], eps=1e-6, backend=backend)
        return out.square().sum() + gate.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (step, compiled):
        leaves = [x.detach().clone().requires_grad_() for x in gate_inputs_once()]
        run(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def gate_inputs_once() -> list[Tensor]:
    torch.manual_seed(3)
    return gate_inputs(2, 3, 16)


@EVERY_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gathered_rows_are_bitwise_the_references(kind: Any, dtype: torch.dtype) -> None:
    for dim, shape in ((32, (3, 5)), (96, (1,)), (256, (37,)), (64, (0, 3))):
        store = quantize_rows(torch.randn(23, dim), kind)
        rows = torch.randint(23, shape)
        want = store.gather(rows, dtype=dtype)
        got = store.to(DEVICE).gather(rows.to(DEVICE), dtype=dtype, backend="triton")
        assert (got.dtype, got.shape) == (dtype, (*shape, dim))
        assert torch.equal(got.cpu(), want)


@pytest.mark.parametrize("dim", [1, 5, 33])
def test_bf16_rows_have_any_width(dim: int) -> None:
    store = quantize_rows(torch.randn(9, dim), "bf16").to(DEVICE)
    rows = torch.tensor([8, 0, 3, 3]).to(DEVICE)
    assert torch.equal(store.gather(rows, backend="triton"), store.data[rows].float())


@pytest.mark.parametrize("first", range(0, 256, 64))
def test_every_8_bit_code_under_every_scale(first: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1).view(torch.float8_e4m3fn)
    scale = torch.arange(first, first + 64, dtype=torch.uint8)[:, None].repeat(1, 8)
    store, rows = RowStore("fp8", codes, scale), torch.arange(64)
    want = store.gather(rows)
    got = store.to(DEVICE).gather(rows.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(
        got.nan_to_num(7.0).view(torch.int32), want.nan_to_num(7.0).view(torch.int32)
    )


def test_every_4_bit_byte_under_every_scale() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 64)
    store, rows = RowStore("fp4", codes, scale), torch.arange(256)
    got = store.to(DEVICE).gather(rows.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got, store.gather(rows))


@EVERY_KIND
def test_rows_outside_the_table_are_nan_and_nothing_else_is_read(kind: Any) -> None:
    store = quantize_rows(torch.randn(50, 64), kind)
    wanted = torch.tensor([3, -1, 49, 50, 0, 2**62, -(2**62), 3])
    good = (wanted >= 0) & (wanted < 50)
    want = store.gather(wanted[good])
    others = torch.ones(50, dtype=torch.bool)
    others[wanted[good]] = False
    store.data.view(torch.uint8)[others] = 0xFF
    if store.scale is not None:
        store.scale[others] = 0xFF
    store = store.to(DEVICE)
    got = store.gather(wanted.to(DEVICE), backend="triton").cpu()
    assert torch.equal(got[good], want)
    assert got[~good].isnan().all()
    empty = quantize_rows(torch.zeros(0, 64), kind).to(DEVICE)
    assert empty.gather(wanted.to(DEVICE), backend="triton").isnan().all()


@EVERY_KIND
def test_rows_may_lie_apart(kind: Any) -> None:
    store = quantize_rows(torch.randn(20, 64), kind).to(DEVICE)
    scale = None if store.scale is None else store.scale[1::2]
    rows = torch.arange(30).to(DEVICE)[2:20:2] // 2
    got = gather_rows(store.data[1::2], scale, rows, backend="triton")
    assert torch.equal(got, store.gather(2 * rows + 1, backend="triton"))


LARGE = EngramConfig(
    engram_layer_ids=(1, 14),
    engram_max_ngram_size=4,
    engram_n_heads=8,
    engram_head_dim=256,
    engram_vocab_size=16_000_000,
    engram_compressed_vocab_size=99_092,
    engram_pad_token_id=2,
    engram_seed=0,
    short_conv=False,
)


def hash_arguments(t: int, config: EngramConfig = LARGE, layer: int = 1) -> tuple[Tensor, ...]:
    spec = build_hash_specs(config)[layer]
    size = config.engram_compressed_vocab_size
    ids = torch.randint(-2, size, (t, config.engram_max_ngram_size))
    constants = (spec.multipliers, spec.table_sizes, spec.table_offsets)
    tensors = (ids, torch.randperm(size), *map(torch.from_numpy, constants))
    return tuple(x.to(DEVICE) for x in tensors)


def test_golden_rows() -> None:
    """Frozen: a change here makes every trained table useless."""
    ids = torch.tensor([[7, 5, 3, 2], [0, 0, 0, 0], [99_091, 99_091, 99_091, 99_091]]).to(DEVICE)
    constants = hash_arguments(0)[2:]
    table = torch.arange(99_092).to(DEVICE)
    rows = engram_hash(ids, table, *constants, pad_token_id=2, backend="triton").cpu()
    assert rows[1].tolist() == constants[2].tolist()
    assert rows[0, [0, 8, 23]].tolist() == [1_465_117, 130_348_112, 382_554_457]
    assert rows[2, [0, 8, 23]].tolist() == [12_193_612, 132_502_226, 375_130_424]


@pytest.mark.parametrize("t", [0, 1, 33])
@pytest.mark.parametrize("places", [2, 3, 4])
def test_hash_equals_the_reference(places: int, t: int) -> None:
    config = dataclasses.replace(LARGE, engram_max_ngram_size=places, engram_n_heads=1 + places)
    arguments = hash_arguments(t, config, 14)
    arguments[0][:, 1:][torch.rand(t, places - 1) < 0.3] = -1  # gaps, latched from there on
    want = engram_hash(*arguments, pad_token_id=2, backend="ref")
    assert torch.equal(engram_hash(*arguments, pad_token_id=2, backend="triton"), want)
    strided = arguments[0].T.contiguous().T
    got = engram_hash(strided, *arguments[1:], pad_token_id=2, backend="triton")
    assert torch.equal(got, want)


def test_hash_has_the_remainder_of_pytorch_for_any_integers() -> None:
    ids = torch.randint(0, 30, (40, 3)).to(DEVICE)
    table = torch.randint(-(2**62), 2**62, (30,)).to(DEVICE)
    multipliers = torch.randint(-(2**62), 2**62, (3,)).to(DEVICE)
    sizes = torch.tensor([7, -7, 2**40, -(2**40) + 1, 1, 2**62]).to(DEVICE)
    arguments = (ids, table, multipliers, sizes, sizes * 0 + 5)
    want = engram_hash(*arguments, pad_token_id=2, backend="ref")
    assert torch.equal(engram_hash(*arguments, pad_token_id=2, backend="triton"), want)


def test_ids_beyond_the_vocabulary_have_no_rows() -> None:
    arguments = hash_arguments(5)
    ids = arguments[0].abs()
    ids[1, 2], ids[3, 0], ids[4, 1] = 99_092, 2**62, -1
    rows = engram_hash(ids, *arguments[1:], pad_token_id=2, backend="triton")
    bad = torch.zeros(5, 24, dtype=torch.bool)
    bad[1, 8:], bad[3] = True, True
    assert torch.equal(rows.cpu() == -1, bad)
    others = engram_hash(ids[[0, 2, 4]], *arguments[1:], pad_token_id=2, backend="ref")
    assert torch.equal(rows[[0, 2, 4]], others)


def test_bad_arguments_name_value_and_rule() -> None:
    h, key, value, weight = gate_inputs(2, 3, 16)
    options = {"eps": 1e-6, "backend": "triton"}
    with pytest.raises(ValueError, match=r"h must be bfloat16, .* for triton, got torch\.float64"):
        engram_gate(h.double(), key, value, weight, **options)
    with pytest.raises(ValueError, match=r"key must be floating point, got torch\.int64"):
        engram_gate(h, key.long(), value, weight, **options)
    with pytest.raises(ValueError, match=f"value must be on {h.device}, got meta"):
        engram_gate(h, key, value.to("meta"), weight, **options)
    with pytest.raises(BackendUnavailable, match="backend must be one of auto, ref, triton"):
        engram_gate(h, key, value, weight, eps=1e-6, backend="cuda")
    store, rows = quantize_rows(torch.randn(3, 64), "fp8").to(DEVICE), torch.zeros(1).long()
    with pytest.raises(ValueError, match=f"rows must be on {h.device}, got meta"):
        store.gather(rows.to("meta"), backend="triton")
    with pytest.raises(ValueError, match=r"dtype must be float32, .*got torch\.int64"):
        store.gather(rows.to(DEVICE), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"data must have contiguous rows, got strides \(1, 64\)"):
        gather_rows(store.data.T, None, rows.to(DEVICE), backend="triton")
    arguments = list(hash_arguments(2))
    arguments[3] = arguments[3].to("meta")
    with pytest.raises(ValueError, match=f"table_sizes must be on {h.device}, got meta"):
        engram_hash(*arguments, pad_token_id=2, backend="triton")
