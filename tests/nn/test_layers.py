"""Joined maps: one product in training, with the numbers and gradients of separate ones."""

from __future__ import annotations

import pytest
import torch

from model1.nn.layers import JointLinear, Linear


@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_a_joined_product_has_the_results_and_gradients_of_separate_ones(num_tokens: int) -> None:
    maps = [Linear(48, width) for width in (24, 16, 3)]  # 43 columns: five of padding
    x = torch.randn(num_tokens, 48, requires_grad=True)
    weights = [m.weight for m in maps]
    grads_out = [torch.randn(num_tokens, len(w)) for w in weights]

    def run(joint: JointLinear) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
        results = list(joint(x, *maps))
        return results, torch.autograd.grad(results, [x, *weights], grads_out)

    expected, expected_grads = run(JointLinear())
    results, grads = run(JointLinear(joins_training=True))
    for got, want in zip([*results, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(got, want)


def test_fp32_weights_are_rounded_to_the_input_in_a_joined_product() -> None:
    maps = [Linear(32, 8), Linear(32, 5)]
    x = torch.randn(6, 32, dtype=torch.bfloat16, requires_grad=True)
    results = JointLinear(joins_training=True)(x, *maps)
    for result, linear in zip(results, maps, strict=True):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result, linear(x))


def test_without_gradients_each_map_multiplies_by_itself() -> None:
    maps = [Linear(32, 8), Linear(32, 5)]
    joint, x = JointLinear(joins_training=True), torch.randn(6, 32, requires_grad=True)
    with torch.no_grad():
        assert all(map(torch.equal, joint(x, *maps), [m(x) for m in maps]))
    assert all(map(torch.equal, joint(x.detach(), *maps), [m(x) for m in maps]))
