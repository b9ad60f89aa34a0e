"""Tasks by example texts: normalisation, ids, and conditions against numbers made by hand."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from service.errors import InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.bundle import Bundle
from service.synthesis.cvae import build_decoder
from service.synthesis.example_tasks import (
    MAX_EXAMPLE_CHARACTERS,
    MAX_EXAMPLE_TEXTS,
    ExampleTasks,
    ExampleTexts,
    ExampleVectors,
    merge_task_vectors,
)
from service.synthesis.synthesizer import Synthesizer
from tests.fixtures.kernel import TASKS, WordEncoder, draw_example_vectors, write_word_bundle

DIGEST = "d" * 64
WORDS = "write a cooking recipe"


# ---------------------------------------------------------------- texts and recipes


@pytest.mark.parametrize(
    "texts",
    [
        ["one\ntwo", "caf\u00e9"],
        ["caf\u00e9", "one\ntwo"],
        ["cafe\u0301", "one\r\ntwo"],
        ["\n caf\u00e9\t", "one\rtwo\n\n"],
    ],
)
def test_examples_that_differ_in_form_or_order_only_are_the_same(texts: list[str]) -> None:
    known = ExampleTexts.build(["one\ntwo", "caf\u00e9"])
    assert ExampleTexts.build(texts) == known
    assert ExampleTexts.build(texts).digest == known.digest


@pytest.mark.parametrize("texts", [["one\n\ntwo"], ["one two"], ["One\ntwo"], ["one\ntwo"] * 2])
def test_what_the_base_would_read_otherwise_is_another_example(texts: list[str]) -> None:
    assert ExampleTexts.build(texts).digest != ExampleTexts.build(["one\ntwo"]).digest


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "1 to 32 texts, not 0"),
        (["x"] * (MAX_EXAMPLE_TEXTS + 1), "not 33"),
        (["x", " \n\t"], r"examples\[1\] is empty"),
        (["x" * (MAX_EXAMPLE_CHARACTERS + 1)], r"examples\[0\] has 4001 characters"),
        (["x", "\ud800"], r"examples\[1\] holds half a character"),
    ],
)
def test_examples_that_cannot_be_used_are_named(texts: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ExampleTexts.build(texts)


def test_examples_do_not_show_in_messages() -> None:
    assert "secret" not in repr(ExampleTexts.build(["secret"]))


def test_recipes_tell_words_examples_and_both_apart() -> None:
    texts = ExampleTexts.build(["one", "two"])
    by_words = AdapterRecipe.build(task="Write.", bundle_digest=DIGEST)
    by_texts = AdapterRecipe.build_from_texts(texts, bundle_digest=DIGEST)
    by_both = AdapterRecipe.build_from_texts(texts, task=" Write. ", bundle_digest=DIGEST)
    assert (by_texts.task, by_both.task) == ("", "Write.")
    assert by_texts.examples == by_both.examples == texts.digest
    assert len({recipe.adapter_id for recipe in (by_words, by_texts, by_both)}) == 3
    for recipe in (by_words, by_texts, by_both):
        assert AdapterRecipe.from_json(recipe.to_json()) == recipe
    assert by_both == replace(by_words, examples=texts.digest)
    with pytest.raises(InvalidInputError, match="description is empty"):
        AdapterRecipe.build_from_texts(texts, task=" ", bundle_digest=DIGEST)


# ---------------------------------------------------------------- conditions and scores

KNOWN = ExampleVectors(
    "by hand",
    vectors=torch.tensor([[14.0, 10.0], [8.0, 10.5], [8.0, 9.5]]),  # their mean is (10, 10)
    spread=torch.tensor([2.0, 0.5]),
    nonsense=torch.tensor([[10.0, 8.5]]),
    left_out=torch.tensor([-0.5, 0.0, 0.5, 2.0]),
    temperature=0.5,
)
TASK_VECTORS = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0], [-1.0, 0.0]])
OWNER = torch.tensor([0, 0, 1, 2])


def test_condition_is_the_softmax_over_centred_cosines_times_mean_words() -> None:
    # (16, 10) less the centre, by the spread, is (3, 0): cosine 1 to task 0, -1 / sqrt(2) to others
    weights = [math.exp(each / 0.5) for each in (1.0, -(0.5**0.5), -(0.5**0.5))]
    first, second, third = (each / sum(weights) for each in weights)
    key = (1.6 / math.hypot(1.6, 0.8), 0.8 / math.hypot(1.6, 0.8))  # of task 0, two wordings
    x, y = first * key[0] - third, first * key[1] + second
    expected = torch.tensor([x / math.hypot(x, y), y / math.hypot(x, y)])

    tasks = ExampleTasks(KNOWN, TASK_VECTORS, OWNER)

    torch.testing.assert_close(tasks.find_task_vector(torch.tensor([16.0, 10.0])), expected)


def test_score_is_the_share_of_left_out_samples_with_no_more_evidence() -> None:
    tasks = ExampleTasks(KNOWN, TASK_VECTORS, OWNER)
    # evidence 1 - 0: nearest task 1, nonsense (0, -3) 0
    assert tasks.score(torch.tensor([16.0, 10.0])) == 0.75
    # the nonsense itself: cosine 1 / sqrt(2) to the nearest task, less 1
    assert tasks.score(torch.tensor([10.0, 8.5])) == 0.25
    alone = replace(KNOWN, left_out=torch.zeros(0))
    assert ExampleTasks(alone, TASK_VECTORS, OWNER).score(torch.tensor([10.0, 8.5])) == 1.0


def test_a_bundle_of_one_task_reads_everything_as_that_task() -> None:
    known = replace(KNOWN, vectors=KNOWN.vectors[:1], left_out=torch.zeros(0))
    tasks = ExampleTasks(known, TASK_VECTORS[:2], OWNER[:2])
    expected = torch.nn.functional.normalize(torch.tensor([1.6, 0.8]), dim=0)
    torch.testing.assert_close(tasks.find_task_vector(torch.tensor([3.0, 4.0])), expected)


def test_words_and_examples_count_alike() -> None:
    merged = merge_task_vectors(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(merged, torch.tensor([0.5**0.5, 0.5**0.5]))


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_word_bundle(tmp_path_factory.mktemp("words"), examples=draw_example_vectors())


@pytest.fixture(scope="module")
def synthesizer(bundle: Bundle) -> Synthesizer:
    return Synthesizer(bundle, WordEncoder())


def build(synthesizer: Synthesizer, **changes: Any) -> AdapterRecipe:
    texts = ExampleTexts.build(["one", "two"])
    digest = synthesizer.bundle.digest
    return AdapterRecipe.build_from_texts(texts, **{"bundle_digest": digest} | changes)


def test_adapter_is_that_of_the_condition(synthesizer: Synthesizer) -> None:
    known, tasks = synthesizer.bundle.examples, synthesizer.example_tasks
    assert known is not None
    assert tasks is not None
    state = known.vectors[1] * 0.9 + known.vectors[0] * 0.1
    condition = tasks.find_task_vector(state)

    adapter = synthesizer.synthesize(build(synthesizer), state)

    assert torch.equal(adapter.vector, synthesizer.decode(condition))
    assert adapter.nearest[0].name == TASKS[1].name
    assert adapter.in_distribution == tasks.score(state)


def test_words_beside_examples_move_the_adapter_and_must_be_a_task_themselves(
    synthesizer: Synthesizer,
) -> None:
    known, tasks = synthesizer.bundle.examples, synthesizer.example_tasks
    assert known is not None
    assert tasks is not None
    state = known.vectors[1]
    words = synthesizer.encoder.encode([WORDS])[0]

    both = synthesizer.synthesize(build(synthesizer, task=WORDS), state)

    merged = merge_task_vectors(words, tasks.find_task_vector(state))
    assert torch.equal(both.vector, synthesizer.decode(merged))
    assert both.in_distribution == min(tasks.score(state), synthesizer.score(WORDS))
    nonsense = synthesizer.synthesize(build(synthesizer, task="zorb qux"), state)
    assert nonsense.in_distribution <= both.in_distribution


def test_adapters_by_example_share_a_batch_with_others_byte_for_byte(
    synthesizer: Synthesizer,
) -> None:
    assert synthesizer.bundle.examples is not None
    state = synthesizer.bundle.examples.vectors[2]
    words = AdapterRecipe.build(task=WORDS, bundle_digest=synthesizer.bundle.digest)
    alone = synthesizer.synthesize(build(synthesizer), state)
    together = synthesizer.synthesize_batch([(words, None), (build(synthesizer), state)])
    assert not isinstance(together[1], Exception)
    assert together[1].vector_sha256 == alone.vector_sha256


def test_a_bundle_without_example_vectors_says_so(tmp_path: Path) -> None:
    synthesizer = Synthesizer(write_word_bundle(tmp_path), WordEncoder())
    with pytest.raises(InvalidInputError, match="bundle words has no example vectors"):
        synthesizer.synthesize(build(synthesizer), torch.zeros(5))


@pytest.mark.parametrize("preset", ["paper", "in_context"])
def test_every_preset_takes_them(bundle: Bundle, tmp_path: Path, preset: str) -> None:
    config = replace(bundle.generator, preset=preset, num_neighbours=2)
    decoder = build_decoder(bundle.layout, config)
    other = write_word_bundle(
        tmp_path, generator=config, decoder=decoder, examples=draw_example_vectors()
    )
    synthesizer = Synthesizer(other, WordEncoder())
    adapter = synthesizer.synthesize(build(synthesizer), draw_example_vectors().vectors[0])
    assert adapter.vector.shape == (bundle.layout.num_params,)
