"""Tasks unlike all training tasks: the threshold, and what each policy makes of them."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from service.adapters.distribution import OutOfDistribution, decide
from service.errors import OutOfDistributionError
from service.synthesis.novelty import THRESHOLD, NoveltyScale, draw_nonsense
from tests.fixtures.adapter_records import make_record
from tests.fixtures.kernel import normal

RECORD = make_record()
"""Score 0.5; nearest task: recipes, at 0.75."""


@pytest.mark.parametrize("policy", list(OutOfDistribution))
def test_what_is_near_enough_answers_whatever_the_policy(policy: OutOfDistribution) -> None:
    decision = decide(RECORD, policy, threshold=0.5)
    assert (decision.kind, decision.nearest.name) == ("in_distribution", "recipes")
    assert (decision.in_distribution, decision.threshold) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("policy", "kind"),
    [
        (OutOfDistribution.NEAREST, "nearest"),
        (OutOfDistribution.BASE, "base"),
        (OutOfDistribution.GENERATE, "generated_out_of_distribution"),
    ],
)
def test_what_is_too_far_is_declared(policy: OutOfDistribution, kind: str) -> None:
    assert decide(RECORD, policy, threshold=0.51).kind == kind


def test_rejection_names_the_nearest_tasks_and_the_ways_out() -> None:
    with pytest.raises(OutOfDistributionError, match=r"recipes \(0.75\), news \(0.25\)") as refusal:
        decide(RECORD, OutOfDistribution.REJECT, threshold=0.8)
    assert (refusal.value.status, refusal.value.code) == (422, "out_of_distribution")
    for word in ("0.500", "0.8", "nearest", "base", "generate"):
        assert word in refusal.value.detail
    more = replace(RECORD, nearest=RECORD.nearest * 5)
    with pytest.raises(OutOfDistributionError) as refusal:
        decide(more, OutOfDistribution.REJECT, threshold=0.8)
    assert refusal.value.detail.count("recipes") == 2


def test_95_percent_of_left_out_tasks_wordings_reach_the_threshold() -> None:
    owner = torch.arange(20).repeat_interleave(10)
    vectors = functional.normalize(normal(20, 8)[owner] + normal(200, 8, seed=1, std=0.3), dim=1)
    nonsense = functional.normalize(normal(4, 8, seed=2), dim=1)
    scale = NoveltyScale(vectors, owner, nonsense)

    scores = [
        scale.score(vectors[row], float((vectors[owner != owner[row]] @ vectors[row]).max()))
        for row in range(len(vectors))
    ]

    accepted = sum(score >= THRESHOLD for score in scores) / len(scores)
    assert accepted == pytest.approx(0.95, abs=0.006)
    assert max(scores) > 0.99
    assert scale.score(nonsense[0], 0.0) == 0.0


def test_one_task_cannot_be_left_out() -> None:
    vectors = functional.normalize(normal(4, 8), dim=1)
    assert NoveltyScale(vectors, torch.zeros(4).long(), vectors).score(vectors[0], -1.0) == 1.0


def test_nonsense_is_the_same_every_time_and_of_two_kinds() -> None:
    texts = draw_nonsense()
    assert texts == draw_nonsense()
    assert len(set(texts)) == len(texts) == 12
    assert all(text.replace(" ", "").isalpha() for text in texts[::2])
    assert not any(letter.isalpha() for text in texts[1::2] for letter in text)
