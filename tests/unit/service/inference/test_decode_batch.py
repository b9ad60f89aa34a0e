"""Decoding against merged weights, what base rows cost, and rows that fail alone."""

from pathlib import Path

import pytest
import torch

from service.errors import InvalidAdapterError
from service.inference.base_model import EMBEDDED_SMOLLM2, load_base_model
from service.inference.completion import Completion, CompletionRequest, GrowingText
from service.inference.decode_batch import DecodeRow
from service.inference.text import Result, TextEngine
from service.synthesis.bases import AdapterBases
from service.synthesis.bundle import read_bundle
from service.synthesis.layout import AdapterKind
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_engine import EngineKit, build_engine, load_random_base

TOKENS = 12
SHIPPED_BUNDLE = Path("service/bundles/text-smollm2")


def get_texts(results: list[Result]) -> list[str]:
    assert all(isinstance(result, Completion) for result in results), results
    return [result.text for result in results if isinstance(result, Completion)]


def generate_merged(cache: Path, kit: EngineKit, request: CompletionRequest) -> str:
    """The greedy text of transformers, alone and unpadded, with `delta W` added to the weights."""
    fresh = load_random_base(cache)
    bases = AdapterBases.from_model(kit.layout, fresh.model)
    assert request.vector is not None
    for path, (down, up) in bases.expand(request.vector).items():
        fresh.model.get_submodule(path).weight += kit.layout.scaling * up @ down
    ids = fresh.tokenizer(request.prompt, return_tensors="pt")
    generated = fresh.model.generate(**ids, max_new_tokens=request.max_tokens, do_sample=False)
    return str(
        fresh.tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    )


@pytest.mark.parametrize("kind", AdapterKind)
def test_padded_rows_say_what_merged_weights_say_alone(kind: AdapterKind, cache: Path) -> None:
    kit = build_engine(load_random_base(cache), kind)
    requests = [
        kit.request(prompt, adapter, max_tokens=TOKENS)
        for adapter, prompt in enumerate(("a", "a prompt of some length", "x" * 33))
    ]
    texts = get_texts(kit.complete(*requests))

    assert texts == [generate_merged(cache, kit, request) for request in requests]
    assert texts != get_texts(
        kit.complete(*(kit.request(request.prompt, max_tokens=TOKENS) for request in requests))
    )


def test_base_rows_switch_the_adapters_off_as_soon_as_they_are_alone(kit: EngineKit) -> None:
    rows = kit.engine._attachment.rows
    active: list[bool] = []

    def is_abandoned(_: int) -> bool:
        active.append(rows.vectors is not None)
        return False

    requests = [kit.request("a", 1, max_tokens=3), kit.request("b", max_tokens=8)]
    kit.engine.complete(requests, is_abandoned=is_abandoned)
    # before the first step; then both; the base alone once the next step has begun
    assert active == [False] * 2 + [True] * 3 + [False] * 4

    active.clear()
    kit.engine.complete([kit.request("b", max_tokens=4)], is_abandoned=is_abandoned)
    assert not any(active)


def test_short_completions_are_told_before_long_ones(kit: EngineKit) -> None:
    told: list[int] = []
    lengths = (9, 3, 6)
    requests = [kit.request("a", i, max_tokens=length) for i, length in enumerate(lengths)]
    kit.engine.complete(requests, on_done=lambda index, _: told.append(index))
    assert told == [1, 2, 0]


def test_a_row_out_of_range_fails_alone(kit: EngineKit) -> None:
    request = kit.request("abc", 1, max_tokens=TOKENS)
    alone = get_texts(kit.complete(request))[0]
    tokenizer = kit.base.tokenizer
    ids = tokenizer(request.prompt)["input_ids"]
    assert request.vector is not None
    rows = []
    for vector in (torch.full_like(request.vector, float("nan")), request.vector):
        lease = kit.engine.slots.acquire(request.adapter_id, request.vector)
        rows.append(DecodeRow(request, ids, GrowingText(tokenizer, ids, ()), lease, vector))
    batch = kit.engine._build_batch()

    assert batch.prefill(rows) == [rows[0]]
    while batch.rows:
        batch.step()
    kit.engine.abort()
    for row in rows:
        row.lease.release()

    assert isinstance(rows[0].error, InvalidAdapterError)
    assert rows[1].text.text == alone


def test_an_engine_that_failed_answers_again(kit: EngineKit) -> None:
    request = kit.request("a", 1, max_tokens=4)
    before = get_texts(kit.complete(request))

    def fail(index: int) -> bool:
        raise RuntimeError("the caller's fault")

    with pytest.raises(RuntimeError, match="the caller's fault"):
        kit.engine.complete([request], is_abandoned=fail)
    assert kit.engine._attachment.rows.vectors is None
    assert kit.engine.slots.stats().leased == 0
    assert get_texts(kit.complete(request)) == before


def test_an_empty_prompt_starts_a_text(kit: EngineKit) -> None:
    completion = kit.complete(kit.request("", max_tokens=3))[0]
    assert isinstance(completion, Completion)
    assert completion.prompt_tokens == 1


@pytest.mark.slow
def test_padded_rows_say_what_they_say_alone_on_smollm2() -> None:
    base = load_base_model(EMBEDDED_SMOLLM2, device="cpu", dtype="float32")
    bundle = read_bundle(SHIPPED_BUNDLE)
    engine = TextEngine(base, bundle.layout, bundle.bases, num_slots=4)
    vectors = normal(4, bundle.layout.num_params, std=0.05).half()
    prompts = ["Once", "The capital of France is", "def main():\n    ", "To make a soup, first"]
    requests = [CompletionRequest(prompt, max_tokens=16) for prompt in prompts]
    requests += [
        CompletionRequest(prompt, f"adapter-{index}", vectors[index], max_tokens=16)
        for index, prompt in enumerate(prompts)
    ]
    together = get_texts(engine.complete(requests))

    assert together == [get_texts(engine.complete([request]))[0] for request in requests]
    assert together[:4] != together[4:]
