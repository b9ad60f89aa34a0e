"""What the scores of unseen tasks say: shares of the headroom, and who is ahead of whom."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from training.evaluation.headroom import (
    HeadroomShare,
    MeanShare,
    average_by_family,
    average_shares,
    measure_text_share,
)
from training.evaluation.outcomes import Outcomes, count_outcomes, judge_difference
from training.evaluation.statistics import Interval, resample_ratio
from training.evaluation.unseen import UnseenSettings


@dataclass(frozen=True)
class MethodShare:
    """How a method fares on all unseen tasks.

    Attributes:
        name: of the method, or `description` and `examples` for prompts.
        share: mean share of the headroom over the tasks that have some, seeds averaged.
        gibberish: the same of what it makes of gibberish; None for prompts.
        behind: mean share of the judged method minus this one's; None for itself.
        outcomes: wins, ties and losses of the judged method against this one, by task.
    """

    name: str
    share: MeanShare
    gibberish: MeanShare | None
    behind: Interval | None
    outcomes: Outcomes | None


def summarize_unseen(
    scores: Mapping[str, Mapping[str, Float[Tensor, " windows"]]],
    families: Mapping[str, str],
    methods: Sequence[str],
    settings: UnseenSettings,
    own_seeds: Sequence[int],
) -> list[MethodShare]:
    """Shares of the headroom, the best mean first; the first of `methods` is the judged one.

    Args:
        scores: of `UnseenEvaluation.score`.
        families: of each task; differences are drawn by family.
        methods: to compare.
        settings: of the evaluation.
        own_seeds: fine-tunings that the own adapter's score is the mean of.

    Raises:
        InvalidInputError: no task has headroom.
    """
    subjects = {name: [f"{name}.{seed}" for seed in settings.seeds] for name in methods}
    subjects |= {"description": ["description"], "examples": ["examples"]}
    judged = methods[0]
    own = _average(scores, [f"own.{seed}" for seed in own_seeds])
    tokens = torch.full((settings.num_windows,), settings.window_tokens - 1.0).double()
    nll = {name: _average(scores, labels) for name, labels in subjects.items()}
    shares = {name: _measure_shares(scores, own, rows, tokens) for name, rows in nll.items()}
    results = []
    for name in subjects:
        gibberish = behind = outcomes = None
        if name in methods:
            rows = _average(scores, [f"{label}.gibberish" for label in subjects[name]])
            told_nothing = _measure_shares(scores, own, rows, tokens)
            gibberish = average_shares(told_nothing, families)
        if name != judged:
            behind = _compare_means(shares[judged], shares[name], families)
            outcomes = _count_by_task(nll[judged], nll[name], tokens)
        share = average_shares(shares[name], families)
        results.append(MethodShare(name, share, gibberish, behind, outcomes))
    return sorted(results, key=lambda result: -result.share.mean.value)


def _average(
    scores: Mapping[str, Mapping[str, Tensor]], labels: Sequence[str]
) -> dict[str, Tensor]:
    return {
        task: torch.stack([each[label] for label in labels]).mean(0)
        for task, each in scores.items()
    }


def _measure_shares(
    scores: Mapping[str, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    tokens: Tensor,
) -> dict[str, HeadroomShare]:
    return {
        task: measure_text_share(each["base"], own[task], rows[task], tokens)
        for task, each in scores.items()
    }


def _compare_means(
    ours: Mapping[str, HeadroomShare],
    theirs: Mapping[str, HeadroomShare],
    families: Mapping[str, str],
) -> Interval:
    """Mean difference of shares over tasks with headroom; whole families are drawn."""
    differences = {
        task: each.share.value - other.value
        for task, each in ours.items()
        if each.share is not None and (other := theirs[task].share) is not None
    }
    return average_by_family(differences, families)


def _count_by_task(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], tokens: Tensor
) -> Outcomes:
    outcomes = []
    for task, nll in ours.items():
        better = resample_ratio(theirs[task] - nll, tokens, seed=0)  # lower NLL is better
        outcomes.append(judge_difference(better.interval()))
    return count_outcomes(outcomes)


def render_shares(results: Sequence[MethodShare]) -> str:
    """Markdown table, a row a method; the last columns are of the judged method against it."""
    lines = [
        "| method | share of headroom | from gibberish | ahead of it by | wins, ties, losses |",
        "|---|--:|--:|--:|--:|",
    ]
    for result in results:
        gibberish = "" if result.gibberish is None else f"{result.gibberish.mean.value:.3f}"
        counts = result.outcomes
        lines.append(
            f"| {result.name} | {_render(result.share.mean)} | {gibberish} | "
            f"{'' if result.behind is None else _render(result.behind)} | "
            f"{'' if counts is None else f'{counts.wins}, {counts.ties}, {counts.losses}'} |"
        )
    return "\n".join(lines)


def _render(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
