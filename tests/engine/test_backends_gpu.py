"""The shipped model on a GPU's kernels: agreement with the reference, no waiting for the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model1.engine.request import Request, SamplingParams
from model1.engine.runner import build_metadata
from model1.engine.scheduler import ScheduledRequest
from model1.nn.kv import KVCache
from model1.nn.metadata import AttentionMetadata
from model1.nn.model import Model
from model1.weights import default_checkpoint, load_model

from .test_backends import BLOCK_SIZE, random_tokens

pytestmark = pytest.mark.gpu


class Stepper:
    """Requests that are stepped by hand, on the device of the model."""

    def __init__(self, model: Model, prompts: list[list[int]], num_new: int) -> None:
        self.model = model
        self.tokens = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        width = -(-(max(map(len, prompts)) + num_new) // BLOCK_SIZE)
        order = torch.randperm(width * len(prompts), generator=torch.Generator().manual_seed(0))
        self.tables = order.view(len(prompts), width).tolist()

    def cache(self) -> KVCache:
        return self.model.allocate_kv_cache(sum(map(len, self.tables)), BLOCK_SIZE, "fp8")

    def step(self) -> AttentionMetadata:
        """Everything that is not in the cache yet."""
        parts = []
        for tokens, done, table in zip(self.tokens, self.done, self.tables, strict=True):
            request = Request("r", tokens, SamplingParams(), num_computed_tokens=done)
            parts.append(ScheduledRequest(request, len(tokens) - done, table))
        self.done = [len(tokens) for tokens in self.tokens]
        device = self.model.embed.weight.device
        return build_metadata(parts, block_size=BLOCK_SIZE, ngram_size=3, device=device)

    def add(self, token_ids: list[int]) -> None:
        for tokens, token_id in zip(self.tokens, token_ids, strict=True):
            tokens.append(token_id)


@pytest.fixture
def on_gpu() -> Model:
    return load_model(default_checkpoint(), device="cuda", dtype=torch.bfloat16)[0]


@pytest.mark.parametrize("lengths", [[40, 300, 1, 129], [2300]], ids=["batch", "sparse"])
def test_triton_is_as_close_to_fp32_as_the_reference(lengths: list[int], on_gpu: Model) -> None:
    """Logits of prompts and 20 steps, in bf16 over an 8-bit cache, beside the same in fp32."""
    exact = load_model(default_checkpoint(), device="cuda", dtype=torch.float32)[0]
    stepper = Stepper(on_gpu, [random_tokens(n, n, 8192) for n in lengths], 20)
    runs = {"exact": (exact, "ref"), "ref": (on_gpu, "ref"), "triton": (on_gpu, "triton")}
    caches = {name: stepper.cache() for name in runs}
    errors = {"ref": 0.0, "triton": 0.0}
    num_equal = 0
    with torch.inference_mode():
        for _ in range(21):
            meta = stepper.step()
            logits: dict[str, Tensor] = {
                name: model.forward_paged(meta, caches[name], backend)
                for name, (model, backend) in runs.items()
            }
            for name in errors:
                errors[name] += float((logits[name] - logits["exact"]).square().sum())
            best = logits["ref"].argmax(-1)
            num_equal += int((logits["triton"].argmax(-1) == best).sum())
            stepper.add(best.tolist())
    assert 0 < errors["triton"] <= 4 * errors["ref"]  # squares: twice the size
    assert num_equal >= 0.9 * 21 * len(lengths)


@pytest.mark.parametrize("lengths", [[40, 300, 1, 129], [2300, 70]], ids=["dense", "mixed"])
def test_a_decode_step_never_waits_for_the_device(lengths: list[int], on_gpu: Model) -> None:
    stepper = Stepper(on_gpu, [random_tokens(n, n, 8192) for n in lengths], 3)
    cache = stepper.cache()
    with torch.inference_mode():
        for _ in range(2):  # prompts, then one step that compiles the kernels
            on_gpu.forward_paged(stepper.step(), cache, "triton")
            stepper.add([7] * len(lengths))
        meta = stepper.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_gpu.forward_paged(meta, cache, "triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")
