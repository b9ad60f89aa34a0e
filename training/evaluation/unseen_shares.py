"""What the scores of unseen tasks say: shares of the headroom, and who is ahead of whom."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from training.evaluation.headroom import (
    HeadroomShare,
    MeanShare,
    average_by_family,
    average_shares,
)
from training.evaluation.outcomes import Outcomes, count_outcomes, judge_difference
from training.evaluation.statistics import Interval
from training.evaluation.unseen import WRONG
from training.evaluation.unseen_suites import Score, UnseenSuite


@dataclass(frozen=True)
class MethodShare:
    """How a method fares on all unseen tasks.

    Attributes:
        name: of the method, or `description` and `examples` for prompts.
        score: mean over all tasks, in the suite's unit, seeds averaged.
        share: mean share of the headroom over the tasks that have some, seeds averaged.
        tasks: share of each task; None where it has no headroom.
        gibberish: the same of what it makes of gibberish; None for prompts.
        behind: mean share of the judged method minus this one's; None for itself.
        outcomes: wins, ties and losses of the judged method against this one, by task.
        better_by: how much better the judged method's score is than this one's, mean over all
            tasks, also those without headroom; None for itself.
        margins: steering margin of each task with headroom: its share, less that from the best
            wrong words; None where only gibberish was tried.
    """

    name: str
    score: float
    share: MeanShare
    tasks: Mapping[str, float | None]
    gibberish: MeanShare | None
    behind: Interval | None
    outcomes: Outcomes | None
    better_by: Interval | None
    margins: Mapping[str, float] | None = None


def summarize_unseen(
    scores: Mapping[str, Mapping[str, Score]],
    families: Mapping[str, str],
    methods: Sequence[str],
    suite: UnseenSuite,
    seeds: Sequence[int],
    own_seeds: Sequence[int],
) -> list[MethodShare]:
    """Shares of the headroom, the best mean first; the first of `methods` is the judged one.

    Args:
        scores: of `UnseenEvaluation.score`.
        families: of each task; differences are drawn by family.
        methods: to compare.
        suite: that scored.
        seeds: of the methods.
        own_seeds: fine-tunings that the own adapter's score is the mean of.

    Raises:
        InvalidInputError: no task has headroom.
    """
    own = [f"own.{seed}" for seed in own_seeds]
    subjects = {name: [f"{name}.{seed}" for seed in seeds] for name in methods}
    subjects |= {prompt: [prompt] for prompt in suite.prompts}
    ours = subjects[methods[0]]

    def measure(labels: Sequence[str]) -> dict[str, HeadroomShare]:
        return {
            task: suite.measure_share(each["base"], _take(each, own), _take(each, labels))
            for task, each in scores.items()
        }

    shares = {name: measure(labels) for name, labels in subjects.items()}
    results = []
    for name, labels in subjects.items():
        gibberish = behind = outcomes = better_by = margins = None
        if name in methods:
            told = WRONG if name == methods[0] else ("gibberish",)
            wrong = {kind: measure([f"{label}.{kind}" for label in labels]) for kind in told}
            gibberish = average_shares(wrong["gibberish"], families)
            if name == methods[0]:
                margins = _measure_margins(shares[name], [*wrong.values()])
        if name != methods[0]:
            behind = _compare_means(shares[methods[0]], shares[name], families)
            compared = {
                task: suite.compare(_take(each, ours), _take(each, labels))
                for task, each in scores.items()
            }
            outcomes = count_outcomes([judge_difference(each) for each in compared.values()])
            better_by = average_by_family(
                {task: each.value for task, each in compared.items()}, families
            )
        share = average_shares(shares[name], families)
        tasks = {
            task: None if each.share is None else each.share.value
            for task, each in shares[name].items()
        }
        score = average_scores(suite, [_take(each, labels) for each in scores.values()])
        results.append(
            MethodShare(name, score, share, tasks, gibberish, behind, outcomes, better_by, margins)
        )
    return sorted(results, key=lambda result: -result.share.mean.value)


def average_scores(suite: UnseenSuite, scores: Sequence[Sequence[Score]]) -> float:
    """Mean over tasks, in the suite's unit; of each task several seeds are averaged."""
    return statistics.mean(suite.read(each) for each in scores)


def _take(scores: Mapping[str, Score], labels: Sequence[str]) -> list[Score]:
    return [scores[label] for label in labels]


def _measure_margins(
    true: Mapping[str, HeadroomShare], wrong: Sequence[Mapping[str, HeadroomShare]]
) -> dict[str, float]:
    margins = {}
    for task, each in true.items():
        if each.share is not None:
            found = [other[task].share for other in wrong]
            margins[task] = each.share.value - max(s.value for s in found if s is not None)
    return margins


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


def render_shares(results: Sequence[MethodShare], unit: str) -> str:
    """Markdown table, a row a method; the last columns are of the judged method against it."""
    lines = [
        f"| method | {unit} | better by | share of headroom | from gibberish | ahead of it by "
        "| wins, ties, losses |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        gibberish = "" if result.gibberish is None else f"{result.gibberish.mean.value:.3f}"
        counts = result.outcomes
        lines.append(
            f"| {result.name} | {result.score:.3f} | "
            f"{'' if result.better_by is None else render_interval(result.better_by)} | "
            f"{render_interval(result.share.mean)} | "
            f"{gibberish} | "
            f"{'' if result.behind is None else render_interval(result.behind)} | "
            f"{'' if counts is None else f'{counts.wins}, {counts.ties}, {counts.losses}'} |"
        )
    return "\n".join(lines)


def render_interval(interval: Interval) -> str:
    """The value, and in brackets its interval."""
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
