"""Generated adapters against the spread of own ones over fine-tuning seeds: tables 1, 2 and 4."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

from training.evaluation.finetune_seeds import RESULT_NAME
from training.evaluation.outcomes import (
    MIN_SEEDS,
    Outcome,
    compare_with_own,
    count_outcomes,
    seed_interval,
)
from training.reproduction.committed import read_evaluation
from training.reproduction.row_store import StoredRow, read_table
from training.reproduction.variants import FINETUNE_SEED, OURS, RANKS
from training.shipped import RESULTS_DIR, SUITES

SHIPPED_RANK = 4
"""Of the shipped detection bundle: rows of Table 4 are further fine-tunings of its adapters."""


@dataclass(frozen=True)
class SeedNoise:
    """Where generated adapters lie among own ones.

    Attributes:
        own: score of own adapters, a mean over tasks, of each fine-tuning seed.
        reach: half the width of a task's seed interval, the median over tasks.
        outcomes: of the generated adapter, by task.
    """

    own: tuple[float, ...]
    reach: float
    outcomes: Mapping[str, Outcome]

    @property
    def num_inside(self) -> int:
        """Tasks whose generated adapter is inside the interval, or better."""
        return sum(each is not Outcome.LOSS for each in self.outcomes.values())


def read_rank_noise(rows: Sequence[StoredRow], rank: int) -> SeedNoise | None:
    """Of a rank of Table 4; None while rows are missing."""
    of_rank = [row for row in rows if row["label"].get("rank") == rank]
    own = [_read_scores(row) for row in of_rank if row["method"] == "own"]
    ours = [row for preset in OURS for row in of_rank if row["method"] == preset]
    return _measure(_read_scores(ours[0]), own) if ours else None


def read_detection_noise(rows: Sequence[StoredRow], results: Path) -> SeedNoise | None:
    """Of Table 1: the bundle's own adapters, and further ones of the same tasks in Table 4."""
    if not (results / SUITES["detection"] / "evaluation.json").exists():
        return None
    evaluated = read_evaluation("detection", results).detection
    own = {each.name: each.ap50["own"].value for each in evaluated}
    further = [
        _read_scores(row)
        for row in rows
        if row["method"] == "own"
        and row["label"]["rank"] == SHIPPED_RANK
        and FINETUNE_SEED in row["label"]
        and {*row["tasks"]} == {*own}
    ]
    generated = {each.name: each.mean_generated_ap50 for each in evaluated}
    return _measure(generated, [own, *further])


def read_text_seeds(results: Path = RESULTS_DIR) -> dict[str, dict[str, float]]:
    """Nats a token by `own.SEED` and `cond_p_diff.SEED`, and by task; empty if not measured."""
    path = results / SUITES["text"] / RESULT_NAME
    if not path.exists():
        return {}
    scores: dict[str, dict[str, float]]
    scores = json.loads(path.read_text(encoding="utf-8"))["nats_per_token"]
    return scores


def read_text_noise(results: Path = RESULTS_DIR) -> SeedNoise | None:
    """Of Table 2, in nats a token, negative: higher is better."""
    seeds = read_text_seeds(results)
    if not seeds:
        return None
    evaluated = read_evaluation("text", results).text
    own = {each.name: each.scores["own"].nats_per_token for each in evaluated}
    further = [scores for label, scores in seeds.items() if label.startswith("own.")]
    generated = {each.name: -each.scores["generated"].nats_per_token for each in evaluated}
    negative = [{name: -nats for name, nats in scores.items()} for scores in (own, *further)]
    return _measure(generated, negative)


def read_text_gaps(results: Path = RESULTS_DIR) -> dict[str, float]:
    """Nats a token beyond own adapters, means over tasks, of `generated` and `cond_p_diff`.

    Each is compared with the own adapters of the fine-tuning seed that it learned from. Empty if
    not measured.
    """
    seeds = read_text_seeds(results)
    label = next((label for label in seeds if label.startswith("cond_p_diff.")), None)
    if label is None:
        return {}
    evaluated = read_evaluation("text", results).text
    own = seeds["own." + label.partition(".")[2]]
    return {
        "generated": mean(
            each.scores["generated"].nats_per_token - each.scores["own"].nats_per_token
            for each in evaluated
        ),
        "cond_p_diff": mean(nats - own[name] for name, nats in seeds[label].items()),
    }


def render_seed_noise(noises: Mapping[str, SeedNoise]) -> Iterator[str]:
    """What the interval is, and a table with a line of each."""
    yield (
        "Would a generated adapter pass for a further fine-tuning of its task? Its score would: of "
        "95 in a hundred fine-tunings the score lies inside the task's seed interval (Student's t "
        "over own adapters of independent seeds, data order included; wide, as the seeds are few). "
        "A score above it is not claimed to be better than the own adapter's."
    )
    lines = [
        "| of | own adapters: mean of each seed | reach of the interval, median "
        "| generated: above, inside, below | below |",
        "|---|--:|--:|--:|---|",
    ]
    for name, noise in noises.items():
        counts = count_outcomes(noise.outcomes.values())
        below = [task for task, outcome in noise.outcomes.items() if outcome is Outcome.LOSS]
        lines.append(
            f"| {name} | {', '.join(f'{abs(value):.3f}' for value in noise.own)} "
            f"| {noise.reach:.3f} | {counts.wins}, {counts.ties}, {counts.losses} "
            f"| {', '.join(below) or '-'} |"
        )
    yield "\n".join(lines)


def list_noises(results: Path, paper: Path) -> dict[str, SeedNoise | None]:
    """All of them, by table and rank."""
    rows = (read_table(paper, 4) or {"rows": []})["rows"]
    return {
        "table 1": read_detection_noise(rows, results),
        "table 2": read_text_noise(results),
        **{f"table 4, rank {rank}": read_rank_noise(rows, rank) for rank in RANKS},
    }


def _read_scores(row: StoredRow) -> dict[str, float]:
    return {name: score["ap50"]["value"] for name, score in row["tasks"].items()}


def _measure(
    generated: Mapping[str, float], own: Sequence[Mapping[str, float]]
) -> SeedNoise | None:
    if len(own) < MIN_SEEDS:
        return None
    by_task = {name: [scores[name] for scores in own] for name in generated}
    intervals = [seed_interval(scores) for scores in by_task.values()]
    return SeedNoise(
        tuple(mean(scores[name] for name in generated) for scores in own),
        median(each.high - each.value for each in intervals),
        compare_with_own(generated, by_task),
    )
