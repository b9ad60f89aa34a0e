"""Steering margin: against brute force over draws, with every control present."""

import numpy as np
import pytest
import torch

from service.errors import InvalidInputError
from service.synthesis.adapter_recipe import AdapterRecipe
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_bundle import TinyBundle
from training.evaluation.statistics import Resampled, draw_units, resample_ratio
from training.evaluation.steering import (
    WRONG_KINDS,
    decode_words,
    list_wrong_descriptions,
    measure_steering,
)
from training.evaluation.text import GIBBERISH

TOKENS = torch.full((30,), 10.0)


def draw_score(seed: int, mean: float) -> tuple[torch.Tensor, Resampled]:
    """Scores of 30 documents, and their mean on draws."""
    sums = TOKENS * (mean + normal(30, seed=seed, std=0.2))
    return sums, resample_ratio(sums, TOKENS, seed=3, resamples=200)


def test_the_margin_is_to_the_best_wrong_description() -> None:
    true_sums, true = draw_score(0, mean=-2.0)
    sums, wrong = {}, {}
    for number, kind in enumerate(WRONG_KINDS):
        pairs = [draw_score(10 * number + i + 1, mean=-2.3 - 0.02 * number) for i in range(2)]
        sums[kind] = [pair[0] for pair in pairs]
        wrong[kind] = [pair[1] for pair in pairs]
    measured = measure_steering(true, wrong)

    def margin(counts: np.ndarray) -> float:
        weights = torch.from_numpy(counts).float()
        score = lambda part: float((part * weights).sum() / (TOKENS * weights).sum())  # noqa: E731
        return score(true_sums) - max(score(part) for parts in sums.values() for part in parts)

    draws = [margin(counts) for counts in draw_units(30, 3, 200)]
    assert measured.margin.value == pytest.approx(margin(np.ones(30)), rel=1e-5)
    assert measured.margin.low == pytest.approx(np.quantile(draws, 0.025), rel=1e-4)
    assert measured.margin.high == pytest.approx(np.quantile(draws, 0.975), rel=1e-4)
    best = max(each.value for parts in wrong.values() for each in parts)
    assert measured.scores[measured.best_wrong] == pytest.approx(best)
    assert measured.scores.keys() == set(WRONG_KINDS)


def test_gibberish_that_does_as_well_leaves_no_margin() -> None:
    _, true = draw_score(0, mean=-2.0)
    _, far = draw_score(1, mean=-3.0)
    wrong = {kind: [far] for kind in WRONG_KINDS} | {"gibberish": [far, true]}
    measured = measure_steering(true, wrong)

    assert measured.best_wrong == "gibberish"
    assert (measured.margin.value, measured.margin.low, measured.margin.high) == (0.0, 0.0, 0.0)


def test_a_margin_over_fewer_controls_is_refused() -> None:
    _, score = draw_score(0, mean=0.0)
    wrong = {kind: [score] for kind in WRONG_KINDS}
    for kind in WRONG_KINDS:
        with pytest.raises(InvalidInputError, match="a wrong description of each"):
            measure_steering(score, {name: wrong[name] for name in WRONG_KINDS if name != kind})
        with pytest.raises(InvalidInputError, match="a wrong description of each"):
            measure_steering(score, wrong | {kind: []})


def test_wrong_descriptions_hold_none_of_the_task() -> None:
    wrong = list_wrong_descriptions("news", {"news": "Write news.", "recipes": "Write a recipe."})

    assert tuple(wrong) == WRONG_KINDS
    assert wrong["other task"] == ("Write a recipe.",)
    assert GIBBERISH in wrong["gibberish"]
    assert len(set(wrong["gibberish"])) == 5
    assert wrong["empty"] == ("",)
    assert "Write news." not in [text for texts in wrong.values() for text in texts]


def test_words_give_the_adapter_that_serving_gives_and_no_words_give_one_too(
    tiny_bundle: TinyBundle,
) -> None:
    synthesizer = tiny_bundle.synthesizer
    recipe = AdapterRecipe.build(task="Bake bread.", bundle_digest=tiny_bundle.bundle.digest)

    decoded = decode_words(synthesizer, "Bake bread.")
    assert torch.equal(decoded, synthesizer.synthesize(recipe).vector)
    empty = decode_words(synthesizer, "")
    assert torch.isfinite(empty).all()
    assert not torch.equal(empty, decoded)
