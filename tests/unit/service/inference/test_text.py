"""Mixed batches against single rows and transformers; ends, errors and receipts of a row."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.adapters.slot_bank import SlotStats
from service.errors import (
    AdapterNotFoundError,
    DeadlineExceededError,
    InvalidInputError,
    NoFreeSlotError,
)
from service.inference.text import Completion, CompletionRequest, Result, group_by_length
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
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def kit(cache: Path) -> EngineKit:
    return build_engine(load_random_base(cache))


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


def test_a_running_batch_does_not_notice_that_its_slots_are_written(cache: Path) -> None:
    small = build_engine(load_random_base(cache), num_slots=2)
    requests = [small.request("a", adapter, max_tokens=12) for adapter in (1, 2)]
    undisturbed = get_texts(small.complete(*requests))
    loads = 0

    def displace_all(_: int) -> bool:
        nonlocal loads
        loads += 1
        vector = torch.full((small.layout.num_params,), float(loads), dtype=torch.float16)
        small.engine.load(f"other-{loads}", vector).release()
        return False

    results = small.engine.complete(requests, is_abandoned=displace_all)
    assert loads > 20
    assert get_texts(results) == undisturbed


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


def test_long_and_short_prompts_are_not_padded_to_each_other() -> None:
    prompts = {0: [1] * 2000, 1: [1], 2: [1, 1], 3: [1] * 1999}
    assert [sorted(group) for group in group_by_length(prompts)] == [[1, 2], [0, 3]]
