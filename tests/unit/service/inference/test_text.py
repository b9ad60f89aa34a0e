from pathlib import Path

import pytest
import torch

from service.errors import DeadlineExceededError, InvalidInputError
from service.inference.text import Completion, CompletionRequest, group_by_length
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


def get_texts(outcomes: list[object]) -> list[str]:
    assert all(isinstance(outcome, Completion) for outcome in outcomes), outcomes
    return [outcome.text for outcome in outcomes if isinstance(outcome, Completion)]


def make_mixed_requests(kit: EngineKit) -> list[CompletionRequest]:
    prompts = ["a", "two words", "a longer prompt than that", "x" * 40]
    adapters = [1, None, 2, 3, None, 4, 5, 1]
    return [
        kit.request(prompts[i % 4], adapter, max_tokens=6 + 3 * i)
        for i, adapter in enumerate(adapters)
    ]


def test_a_mixed_batch_answers_each_row_as_if_it_were_alone(kit: EngineKit) -> None:
    requests = make_mixed_requests(kit)
    together = get_texts(kit.complete(*requests))
    alone = [get_texts(kit.complete(request))[0] for request in requests]
    assert together == alone
    assert len(set(together)) > 4  # the adapters do change the texts


def test_base_rows_are_what_transformers_generates(kit: EngineKit) -> None:
    prompt = "what the base says"
    completion = kit.complete(kit.request(prompt, max_tokens=12))[0]
    ids = kit.base.tokenizer(prompt, return_tensors="pt")
    generated = kit.base.model.generate(**ids, max_new_tokens=12, do_sample=False)
    expected = kit.base.tokenizer.decode(generated[0, ids["input_ids"].shape[1] :])
    assert isinstance(completion, Completion)
    assert completion.text == expected.replace("<|endoftext|>", "")
    assert (completion.slot, completion.generation) == (0, 0)


def test_receipts_name_slot_and_load(kit: EngineKit) -> None:
    first, second = kit.complete(kit.request("a", 1), kit.request("a", 2))
    assert isinstance(first, Completion)
    assert isinstance(second, Completion)
    assert first.slot != second.slot
    assert 0 < first.generation != second.generation > 0


def test_sampling_depends_on_the_seed_and_not_on_the_batch(kit: EngineKit) -> None:
    sampled = kit.request("seeded", 1, temperature=1.0, top_p=0.9, seed=3, max_tokens=10)
    other = kit.request("other", 2, temperature=1.5, seed=4, max_tokens=20)
    alone = get_texts(kit.complete(sampled))[0]
    assert get_texts(kit.complete(other, sampled))[1] == alone
    reseeded = kit.request("seeded", 1, temperature=1.0, top_p=0.9, seed=5, max_tokens=10)
    assert get_texts(kit.complete(reseeded))[0] != alone


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
    good = kit.request("good", 1, max_tokens=4)
    long, wide, answered = kit.complete(
        kit.request("x" * (MAX_PROMPT + 1)), kit.request("x", max_tokens=CONTEXT), good
    )
    assert isinstance(long, InvalidInputError)
    assert str(MAX_PROMPT) in long.detail
    assert isinstance(wide, InvalidInputError)
    assert str(CONTEXT) in wide.detail
    assert isinstance(answered, Completion)


def test_an_adapter_that_overflows_the_base_is_an_error_and_not_a_text(kit: EngineKit) -> None:
    huge = torch.full((kit.layout.num_params,), 6e4).half()
    broken = CompletionRequest("a", "huge", huge, max_tokens=4)
    outcome, fine = kit.complete(broken, kit.request("a", max_tokens=4))
    assert isinstance(fine, Completion)
    if isinstance(outcome, Completion):  # finite after all: then it must be that adapter's text
        assert outcome.slot > 0


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


def test_values_out_of_range_are_refused() -> None:
    for wrong in (
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"seed": -1},
        {"stop": ("",)},
    ):
        with pytest.raises(InvalidInputError):
            CompletionRequest("a", **wrong)  # type: ignore[arg-type]


def test_long_and_short_prompts_are_not_padded_to_each_other() -> None:
    prompts = {0: [1] * 2000, 1: [1], 2: [1, 1], 3: [1] * 1999}
    assert [sorted(group) for group in group_by_length(prompts)] == [[1, 2], [0, 3]]
