"""Mixed batches against single rows and transformers; ends, errors and receipts of a row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.adapters.slot_bank import SlotStats
from service.errors import (
    AdapterMismatchError,
    AdapterNotFoundError,
    DeadlineExceededError,
    InvalidAdapterError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.inference.completion import TextDelta
from service.inference.text import Completion, CompletionRequest, Result
from service.synthesis.synthesizer import digest_vector
from tests.fixtures.tiny_engine import (
    CONTEXT,
    LETTERS,
    MAX_PROMPT,
    EngineKit,
    build_engine,
    load_chained_base,
    load_random_base,
)


@pytest.fixture(scope="module")
def chained(cache: Path) -> EngineKit:
    return build_engine(load_chained_base(cache))


def get_completions(results: list[Result]) -> list[Completion]:
    completions = [result for result in results if isinstance(result, Completion)]
    assert len(completions) == len(results), results
    return completions


def get_texts(results: list[Result]) -> list[str]:
    return [completion.text for completion in get_completions(results)]


def make_mixed_requests(kit: EngineKit, **options: Any) -> list[CompletionRequest]:
    """Eight rows of different prompts, adapters and lengths; three of them are the base's."""
    prompts = ["a", "two words", "a longer prompt than that", "x" * 40]
    adapters = [1, None, 2, 3, None, 4, 1, None]
    return [
        kit.request(prompts[i % 4], adapter, max_tokens=6 + 3 * (5 * i % 8), **options)
        for i, adapter in enumerate(adapters)
    ]


def generate_tokens(kit: EngineKit, request: CompletionRequest) -> str:
    """What transformers' own loop says, greedily, without any adapter code."""
    ids = kit.base.tokenizer(request.prompt, return_tensors="pt")
    generated = kit.base.model.generate(**ids, max_new_tokens=request.max_tokens, do_sample=False)
    new_ids = generated[0, ids["input_ids"].shape[1] :]
    return str(kit.base.tokenizer.decode(new_ids, skip_special_tokens=True))


def test_a_mixed_batch_answers_each_row_as_if_it_were_alone(kit: EngineKit) -> None:
    requests = make_mixed_requests(kit)
    together = get_completions(kit.complete(*requests))
    alone = [get_completions(kit.complete(request))[0] for request in requests]
    assert [each.text for each in together] == [each.text for each in alone]
    assert len({each.text[:6] for each in together}) == 8  # the adapters do change the texts
    assert [each.prompt_tokens for each in together] == [1, 9, 25, 40] * 2
    for each, request in zip(together, requests, strict=True):
        assert each.completion_tokens <= request.max_tokens
        assert (each.completion_tokens == request.max_tokens) or each.finish_reason == "stop"


def test_rows_that_leave_change_nothing_for_those_that_stay(kit: EngineKit) -> None:
    requests = make_mixed_requests(kit)
    leaving = get_texts(kit.complete(*requests))
    staying = get_texts(kit.complete(*(replace(request, max_tokens=30) for request in requests)))
    for shorter, longer in zip(leaving, staying, strict=True):
        assert longer.startswith(shorter)


def test_base_rows_of_a_mixed_batch_are_what_transformers_generates(
    kit: EngineKit, cache: Path
) -> None:
    untouched = EngineKit(kit.engine, load_random_base(cache), kit.layout)
    requests = make_mixed_requests(kit)
    completions = get_completions(kit.complete(*requests))
    pairs = [
        (completion, generate_tokens(untouched, request))
        for completion, request in zip(completions, requests, strict=True)
        if request.adapter_id is None
    ]
    assert len(pairs) == 3
    for completion, expected in pairs:
        assert completion.text == expected
        assert (completion.slot, completion.generation) == (0, 0)


def test_receipts_name_slot_and_load(kit: EngineKit) -> None:
    first, second, again = get_completions(
        kit.complete(kit.request("a", 1), kit.request("a", 2), kit.request("b", 1))
    )
    assert 0 < first.slot != second.slot > 0
    assert 0 < first.generation != second.generation > 0
    assert (again.slot, again.generation) == (first.slot, first.generation)
    assert set(first.seconds) == {"prefill", "decode"}
    kit.engine.slots.evict("adapter-1")
    (reloaded,) = get_completions(kit.complete(kit.request("a", 1)))
    assert reloaded.generation > max(first.generation, second.generation)
    assert reloaded.text == first.text


def test_a_loaded_adapter_answers_without_its_vector(kit: EngineKit) -> None:
    request = kit.request("a", 6, max_tokens=8)
    assert request.adapter_id is not None
    assert request.vector is not None
    with kit.engine.load(request.adapter_id, request.vector) as lease:
        pass
    (completion,) = get_completions(kit.complete(replace(request, vector=None)))
    assert (completion.slot, completion.generation) == (lease.slot, lease.generation)
    assert completion.text == get_texts(kit.complete(request))[0]


def test_sampling_depends_on_the_seed_and_not_on_the_batch(kit: EngineKit) -> None:
    sampled = make_mixed_requests(kit, temperature=1.0, top_p=0.9)
    sampled = [replace(request, seed=seed) for seed, request in enumerate(sampled)]
    greedy = kit.request("greedy", 2, max_tokens=20)
    alone = [get_texts(kit.complete(request))[0] for request in sampled]
    assert get_texts(kit.complete(*sampled)) == alone
    assert get_texts(kit.complete(greedy, *reversed(sampled)))[1:] == alone[::-1]
    reseeded = [replace(request, seed=request.seed + 100) for request in sampled]
    assert not set(get_texts(kit.complete(*reseeded))) & set(alone)


def test_more_adapters_than_slots_share_a_batch(cache: Path) -> None:
    small = build_engine(load_random_base(cache), num_slots=2)
    requests = [small.request("a", adapter, max_tokens=4) for adapter in range(1, 6)]
    together = get_texts(small.complete(*requests))
    assert together == [get_texts(small.complete(request))[0] for request in requests]
    assert small.engine.slots.stats().leased == 0


def test_end_tokens_stop_texts_and_length_end_a_completion(chained: EngineKit) -> None:
    by_length, by_stop, by_end = chained.complete(
        chained.request("a", max_tokens=5),
        chained.request("a", max_tokens=40, stop=("xyz", "fgh", "ghi")),
        chained.request("A", max_tokens=40),
    )
    assert isinstance(by_length, Completion)
    assert isinstance(by_stop, Completion)
    assert isinstance(by_end, Completion)
    assert (by_length.text, by_length.finish_reason) == ("bcdef", "length")
    assert (by_stop.text, by_stop.finish_reason) == ("bcde", "stop")
    assert (by_end.text, by_end.finish_reason, by_end.completion_tokens) == ("BC", "stop", 3)


@pytest.mark.parametrize("max_tokens", range(1, 9))
def test_a_text_never_ends_within_a_character(chained: EngineKit, max_tokens: int) -> None:
    whole = "é1€2😀3"
    text = get_texts(chained.complete(chained.request("0", max_tokens=max_tokens)))[0]
    assert whole.startswith(text)
    assert "\ufffd" not in text


def test_a_bad_request_fails_alone(kit: EngineKit) -> None:
    good, base = kit.request("good", 1, max_tokens=4), kit.request("good", max_tokens=4)
    alone = get_texts(kit.complete(good)) + get_texts(kit.complete(base))
    long, wide, first, unknown, second = kit.complete(
        kit.request("x" * (MAX_PROMPT + 1)),
        kit.request("x", max_tokens=CONTEXT),
        good,
        CompletionRequest("x", "never-loaded"),
        base,
    )
    assert isinstance(long, InvalidInputError)
    assert str(MAX_PROMPT) in long.detail
    assert isinstance(wide, InvalidInputError)
    assert str(CONTEXT) in wide.detail
    assert isinstance(unknown, AdapterNotFoundError)  # and never the base's text
    assert get_texts([first, second]) == alone
    assert kit.engine.slots.stats().leased == 0


def test_the_longest_prompt_and_the_whole_context_are_allowed(chained: EngineKit) -> None:
    longest = chained.request("x" * MAX_PROMPT, max_tokens=CONTEXT - MAX_PROMPT)
    (completion,) = get_completions(chained.complete(longest))
    assert completion.completion_tokens == CONTEXT - MAX_PROMPT


def test_an_adapter_that_finds_no_slot_fails_alone(cache: Path) -> None:
    small = build_engine(load_random_base(cache), num_slots=1)
    first, second = small.request("a", 1, max_tokens=3), small.request("a", 2, max_tokens=3)
    assert first.vector is not None
    with small.engine.load("adapter-1", first.vector):
        one, two, base = small.complete(first, second, small.request("a", max_tokens=3))
    assert isinstance(two, NoFreeSlotError)
    assert len(get_texts([one, base])) == 2
    assert small.engine.slots.stats() == SlotStats(total=1, resident=1, leased=0)


def test_slots_are_not_written_while_rows_hold_them(cache: Path) -> None:
    small = build_engine(load_random_base(cache), num_slots=3)
    requests = [small.request("a", adapter, max_tokens=12) for adapter in (1, 2)]
    undisturbed = get_texts(small.complete(*requests))
    loads = 0

    def displace_others(_: int) -> bool:
        nonlocal loads
        if small.engine.slots.stats().leased == 2:
            loads += 1
            vector = torch.full((small.layout.num_params,), float(loads), dtype=torch.float16)
            small.engine.load(f"other-{loads}", vector).release()
        return False

    results = small.engine.complete(requests, is_abandoned=displace_others)
    assert loads > 10
    assert get_texts(results) == undisturbed
    assert [each.generation for each in get_completions(results)] == [1, 2]


def test_an_empty_prompt_needs_a_start_token(cache: Path) -> None:
    base = load_random_base(cache)
    base.model.generation_config.bos_token_id = None
    kit = build_engine(base)
    empty, other = kit.complete(kit.request(""), kit.request("x", max_tokens=2))
    assert isinstance(empty, InvalidInputError)
    assert isinstance(other, Completion)


def test_an_adapter_of_the_largest_values_disturbs_nobody(kit: EngineKit) -> None:
    largest = torch.finfo(torch.float16).max
    vector = torch.full((kit.layout.num_params,), largest, dtype=torch.float16)
    fine = kit.request("a", max_tokens=4)
    alone = get_texts(kit.complete(fine))
    _, beside = kit.complete(CompletionRequest("a", "huge", vector, max_tokens=4), fine)
    assert get_texts([beside]) == alone


def test_abandoned_rows_leave_and_the_others_go_on(chained: EngineKit) -> None:
    requests = [chained.request("a", max_tokens=30), chained.request("b", max_tokens=6)]
    asked: list[int] = []

    def is_abandoned(index: int) -> bool:
        asked.append(index)
        return index == 0 and len(asked) > 4

    gone, done = chained.engine.complete(requests, is_abandoned=is_abandoned)
    assert isinstance(gone, DeadlineExceededError)
    assert isinstance(done, Completion)
    assert done.text == LETTERS[2:8]


def test_rows_abandoned_from_the_start_are_not_decoded(kit: EngineKit) -> None:
    requests = make_mixed_requests(kit)
    alone = get_texts(kit.complete(requests[5]))
    results = kit.engine.complete(requests, is_abandoned=lambda index: index != 5)
    assert get_texts([results[5]]) == alone
    assert all(isinstance(results[index], DeadlineExceededError) for index in {*range(8)} - {5})
    steps: list[object] = []
    hook = kit.base.model.register_forward_pre_hook(lambda *_: steps.append(1))
    kit.engine.complete(requests, is_abandoned=lambda _: True)
    hook.remove()
    assert not steps


def test_leases_are_given_back_where_the_model_fails(kit: EngineKit) -> None:
    steps = 0

    def fail(*_: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise RuntimeError("out of memory")

    hook = kit.base.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        kit.complete(*make_mixed_requests(kit))
    hook.remove()
    assert kit.engine.slots.stats().leased == 0
    generated = generate_tokens(kit, kit.request("a", max_tokens=4))  # no adapter stays behind
    assert get_texts(kit.complete(kit.request("a", max_tokens=4))) == [generated]


def test_a_bfloat16_base_answers_too(cache: Path) -> None:
    base = load_random_base(cache)
    base.model.to(torch.bfloat16)
    kit = build_engine(base)
    completions = get_completions(kit.complete(*make_mixed_requests(kit)))
    assert all(completion.completion_tokens > 0 for completion in completions)
    adapted, base_text = get_texts(kit.complete(kit.request("a", 1), kit.request("a")))
    assert adapted != base_text


@pytest.mark.parametrize("prefill_tokens", [1, 7, 64])
def test_prompts_read_in_parts_or_together_give_the_same_texts(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch, prefill_tokens: int
) -> None:
    requests = [*make_mixed_requests(kit), kit.request("y" * 200, 2, max_tokens=9)]
    at_once = get_texts(kit.complete(*requests))
    widths: list[int] = []
    monkeypatch.setattr(kit.engine, "_prefill_tokens", prefill_tokens)
    hook = kit.base.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    in_parts = get_texts(kit.complete(*requests))
    hook.remove()
    assert in_parts == at_once
    assert max(widths) <= max(prefill_tokens, len(requests))


def test_rows_that_join_later_answer_as_if_alone(kit: EngineKit) -> None:
    """Requests arrive one by one while others run; slots are fewer than requests."""
    requests = make_mixed_requests(kit)
    alone = [get_texts(kit.complete(request))[0] for request in requests]
    results: dict[int, Result] = {}

    class Arrival:
        wants_deltas = False

        def __init__(self, index: int) -> None:
            self.index, self.request = index, requests[index]

        def is_abandoned(self) -> bool:
            return False

        def on_first_token(self) -> None: ...

        def emit(self, delta: TextDelta) -> None: ...

        def resolve(self, result: Result) -> None:
            results[self.index] = result

    for index in range(len(requests)):
        assert kit.engine.admit([Arrival(index)]) == []
        kit.engine.step()
        kit.engine.step()
    while kit.engine.num_running:
        kit.engine.step()
    assert get_texts([results[index] for index in range(len(requests))]) == alone
    assert kit.engine.slots.stats().leased == 0


def test_log_probabilities_are_those_of_transformers(kit: EngineKit, cache: Path) -> None:
    prompt = "some words that come before"
    (completion,) = get_completions(
        kit.complete(kit.request(prompt, max_tokens=7, num_logprobs=3, prompt_logprobs=True))
    )
    untouched = load_random_base(cache)
    prompt_ids = untouched.tokenizer(prompt)["input_ids"]
    ids = torch.tensor([[*prompt_ids, *completion.token_ids]])
    with torch.no_grad():
        expected = untouched.model(ids).logits[0].log_softmax(dim=-1)
    assert completion.prompt_logprobs is not None
    assert completion.logprobs is not None
    entries = [*completion.prompt_logprobs, *completion.logprobs]
    assert [entry.token_id for entry in entries] == ids[0].tolist()
    assert (entries[0].logprob, entries[0].top) == (None, ())
    for position, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(float(expected[position, entry.token_id]), abs=1e-4)
        best = expected[position].topk(3)
        assert [token for token, _, _ in entry.top] == best.indices.tolist()
        assert [value for _, _, value in entry.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_prompt_alone_can_be_scored(kit: EngineKit) -> None:
    tokens = tuple(kit.base.tokenizer("x" * 100)["input_ids"])
    request = kit.request("", max_tokens=0, prompt_logprobs=True, num_logprobs=1)
    (completion,) = get_completions(kit.complete(replace(request, prompt=tokens)))
    assert (completion.text, completion.completion_tokens) == ("", 0)
    assert completion.prompt_logprobs is not None
    assert len(completion.prompt_logprobs) == len(tokens) == completion.prompt_tokens


@pytest.mark.parametrize(("max_tokens", "prefill_tokens"), [(0, 64), (4, 64), (0, 16)])
def test_a_scored_prompt_that_is_not_finite_fails_alone(
    kit: EngineKit, monkeypatch: pytest.MonkeyPatch, max_tokens: int, prefill_tokens: int
) -> None:
    monkeypatch.setattr(kit.engine, "_prefill_tokens", prefill_tokens)
    scored = kit.request("x" * 40, 1, max_tokens=max_tokens, prompt_logprobs=True)
    fine = kit.request("a", 2, max_tokens=4)
    alone = get_texts(kit.complete(fine))

    def poison(_: object, __: object, logits: torch.Tensor) -> None:
        if logits.shape[1] > 1:  # of a scored prompt; of others the last is read only
            logits[0, 3, 5] = float("nan")

    hook = kit.base.model.lm_head.register_forward_hook(poison)
    try:
        failed, beside = kit.complete(scored, fine)
    finally:
        hook.remove()
    assert isinstance(failed, InvalidAdapterError)
    assert get_texts([beside]) == alone
    assert kit.engine.slots.stats().leased == 0


def test_unknown_tokens_are_refused(kit: EngineKit) -> None:
    (failed,) = kit.complete(replace(kit.request(""), prompt=(1, 10_000)))
    assert isinstance(failed, InvalidInputError)


def test_a_slot_that_holds_something_else_answers_nothing(kit: EngineKit) -> None:
    request = kit.request("a", 1, max_tokens=4)
    assert request.vector is not None
    right = replace(request, vector_sha256=digest_vector(request.vector))
    assert get_texts(kit.complete(right)) == get_texts(kit.complete(request))
    (failed,) = kit.complete(replace(request, vector_sha256="0" * 64))
    assert isinstance(failed, AdapterMismatchError)

    def overwrite(_: int) -> bool:
        kit.engine.slots._vectors[lease.slot] += 1
        return False

    with kit.engine.load("adapter-1", request.vector) as lease:
        (late,) = kit.engine.complete([right], is_abandoned=overwrite)
    assert isinstance(late, AdapterMismatchError)
    assert get_texts(kit.complete(right)) == get_texts(kit.complete(request))  # loaded anew
    assert kit.engine.slots.stats().leased == 0
