from __future__ import annotations

import math
from typing import Any

import pytest

from model1.engine.request import Request, SamplingParams
from model1.errors import RequestError

BAD = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1e30),
    ("max_tokens", True),
    ("min_tokens", -1),
    ("min_tokens", 17),  # above max_tokens
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("temperature", "1"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -1),
    ("top_k", 1.0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", 2**63),
    ("seed", False),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.nan),
    ("stop", "text"),
    ("stop", ("",)),
    ("stop", ("x" * 257,)),
    ("stop", ("x",) * 17),
    ("stop_token_ids", (-1,)),
    ("stop_token_ids", [1]),
    ("ignore_eos", 1),
    ("logprobs", 21),
    ("logprobs", -1),
    ("logit_bias", ((1, math.nan),)),
    ("logit_bias", ((1, 101.0),)),
    ("logit_bias", ((1, 1.0), (1, 2.0))),
    ("logit_bias", (1,)),
    ("skip_special_tokens", None),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        SamplingParams(**{name: value})
    assert caught.value.param == name
    assert len(str(caught.value)) < 200


def test_limits_are_allowed() -> None:
    SamplingParams(
        max_tokens=1,
        min_tokens=1,
        temperature=0,
        top_p=1,
        min_p=1,
        seed=-(2**63),
        presence_penalty=-2,
        stop=("x" * 256,) * 16,
        logprobs=20,
        logit_bias=((0, -100), (1, 100.0)),
    )


def test_random_numbers_are_a_function_of_seed_and_token_count() -> None:
    def numbers(seed: int | None) -> list[float]:
        request = Request("a", [1, 2], SamplingParams(seed=seed))
        values = []
        for token in range(200):
            values += [request.uniform()]
            assert request.uniform() == values[-1]
            request.token_ids.append(token)
        return values

    assert numbers(7) == numbers(7)
    assert len(set(numbers(7)) | set(numbers(-7)) | set(numbers(None)) | set(numbers(None))) == 800
    assert all(0 <= u < 1 for u in numbers(-(2**63)))
    assert abs(sum(numbers(3)) / 200 - 0.5) < 0.1
