"""`icm-lora reproduce --check`: targets on the committed results, and a live random sample."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.evaluation.detection import MAX_MEAN_GAP, MAX_TASK_GAP, check_detection, mean_ap50
from training.evaluation.seen_steering import RESULT_NAME as STEERING_NAME
from training.evaluation.text import MAX_PPL_RATIO
from training.reproduction.committed import PAPER_DIR, read_evaluation
from training.reproduction.remeasure import Remeasured, remeasure_suite
from training.reproduction.row_store import StoredRow, read_table
from training.reproduction.seed_noise import list_noises, read_text_gaps
from training.reproduction.tables import LABELS, compare
from training.reproduction.unseen_results import UNSEEN_DIRS, list_unseen_targets, read_unseen
from training.reproduction.variants import OURS, RANKS, SWEEPS
from training.shipped import RESULTS_DIR, SUITES

AP50_TOLERANCE = 0.02
"""A live AP50 may differ so much from the committed one: processors round otherwise, and a box
that moves over the threshold of IoU 0.5 counts whole."""

PPL_TOLERANCE = 0.01
"""The same for a perplexity, relative: the base computes in bfloat16."""

MIN_SHARE = 0.9
"""Share of tasks on which a generated adapter must be as good as the task's own."""


@dataclass(frozen=True)
class Verdict:
    """One target.

    Attributes:
        name: what was looked at.
        measured: what there is.
        target: what must be.
        passed: None where nothing was measured yet.
    """

    name: str
    measured: str
    target: str
    passed: bool | None


def check_committed(results: Path = RESULTS_DIR, paper: Path = PAPER_DIR) -> list[Verdict]:
    """Targets on committed results.

    Seen tasks of both suites, ranks of Table 4, unseen tasks, in-distribution scores.
    """
    return [
        *_check_detection(results),
        *_check_text(results),
        *_check_ranks(paper),
        *_check_seed_noise(results, paper),
        *_check_steering(results),
        *_check_unseen(results),
        *_check_in_distribution(results),
    ]


def check_live(names: Sequence[str] = ("detection", "text")) -> Iterator[Verdict]:
    """Measures a random task of each suite again, as its committed evaluation did."""
    for suite in names:
        done = remeasure_suite(suite, random.SystemRandom())
        yield judge(done, suite)


def judge(done: Remeasured, suite: str) -> Verdict:
    """Compares what was measured again with what is committed."""
    if suite == "detection":
        tolerance, difference = AP50_TOLERANCE, abs(done.live - done.committed)
        unit = "AP50"
    else:
        tolerance, difference = PPL_TOLERANCE, abs(done.live / done.committed - 1)
        unit = "perplexity"
    return Verdict(
        f"{suite}, measured again: {done.task}",
        f"{unit} {done.live:.3f}",
        f"{done.committed:.3f} within {tolerance:g}" + (" of it" if suite == "text" else ""),
        difference <= tolerance,
    )


def render_verdicts(verdicts: Sequence[Verdict]) -> str:
    """A table for the terminal."""
    words = {True: "ok", False: "MISSED", None: "not measured"}
    widths = [max(len(getattr(v, part)) for v in verdicts) for part in ("name", "measured")]
    return "\n".join(
        f"{words[v.passed]:<13} {v.name:<{widths[0]}}  {v.measured:<{widths[1]}}  {v.target}"
        for v in verdicts
    )


def _check_detection(results: Path) -> Iterator[Verdict]:
    found = read_evaluation("detection", results).detection
    gaps = [abs(r.mean_generated_ap50 - r.ap50["own"].value) for r in found]
    means = mean_ap50(found)
    yield Verdict(
        "table 1: generated like own",
        f"{sum(gap <= MAX_TASK_GAP for gap in gaps)} of {len(gaps)} categories",
        f"within {MAX_TASK_GAP:g} AP50 on each",
        max(gaps) <= MAX_TASK_GAP,
    )
    gap = means["generated"] - means["own"]
    yield Verdict(
        "table 1: mean of generated less own",
        f"{gap:+.4f}",
        f"within {MAX_MEAN_GAP:g} AP50",
        abs(gap) <= MAX_MEAN_GAP,
    )
    yield Verdict(
        "table 1: ahead of Model Soup on the mean",
        f"{means['generated']:.3f}",
        f"above {means['soup']:.3f} AP50",
        means["generated"] > means["soup"],
    )
    missed = check_detection(found).missed
    yield Verdict(
        "table 1: all targets of the suite", f"{len(missed)} missed", "0 missed", not missed
    )


def _check_text(results: Path) -> Iterator[Verdict]:
    found = read_evaluation("text", results).text
    ratios = [r.ppl_ratio.value for r in found]
    yield Verdict(
        "table 2: generated like own",
        f"{sum(ratio <= MAX_PPL_RATIO for ratio in ratios)} of {len(ratios)} domains",
        f"perplexity at most {MAX_PPL_RATIO:g} of own on each",
        max(ratios) <= MAX_PPL_RATIO,
    )
    means = {
        method: sum(r.scores[method].nats_per_token for r in found) / len(found)
        for method in ("generated", "soup")
    }
    yield Verdict(
        "table 2: ahead of Model Soup on the mean",
        f"{means['generated']:.3f}",
        f"below {means['soup']:.3f} nats a token",
        means["generated"] < means["soup"],
    )
    gaps = read_text_gaps(results)
    name = f"table 2: ahead of {LABELS['cond_p_diff']} on the mean"
    if not gaps:
        yield Verdict(name, "-", "python -m training.evaluation.finetune_seeds", None)
        return
    yield Verdict(
        name,
        f"{gaps['generated']:+.4f} of own",
        f"below {gaps['cond_p_diff']:+.4f} nats a token",
        gaps["generated"] < gaps["cond_p_diff"],
    )


def _check_ranks(paper: Path) -> Iterator[Verdict]:
    document: dict[str, Any] = read_table(paper, SWEEPS[0]) or {"rows": []}
    for rank in RANKS:
        rows: dict[str, StoredRow] = {
            row["method"]: row for row in document["rows"] if row["label"] == {"rank": rank}
        }
        ours = next((rows[preset] for preset in OURS if preset in rows), None)
        name = f"table 4, rank {rank}"
        if ours is None or "own" not in rows:
            yield Verdict(f"{name}: generated like own", "-", "icm-lora reproduce --table 4", None)
            continue
        own = rows["own"]["tasks"]
        near = [
            abs(score["ap50"]["value"] - own[task]["ap50"]["value"]) <= MAX_TASK_GAP
            for task, score in ours["tasks"].items()
        ]
        yield Verdict(
            f"{name}: generated like own",
            f"{sum(near)} of {len(near)} categories",
            f"within {MAX_TASK_GAP:g} AP50 on {MIN_SHARE:.0%}",
            sum(near) >= MIN_SHARE * len(near),
        )
        for method in ("soup", "cond_p_diff"):
            if method in rows:
                gap = compare(ours, rows[method]).value
                yield Verdict(
                    f"{name}: ahead of {LABELS[method]}", f"{gap:+.3f} AP50", "above 0", gap > 0
                )


def _check_seed_noise(results: Path, paper: Path) -> Iterator[Verdict]:
    for name, noise in list_noises(results, paper).items():
        target = f"{name}: generated within the own adapter's seed interval"
        if noise is None:
            yield Verdict(target, "-", "further fine-tuning seeds", None)
            continue
        count = len(noise.outcomes)
        yield Verdict(
            target,
            f"{noise.num_inside} of {count} tasks",
            f"inside or better on {MIN_SHARE:.0%}",
            noise.num_inside >= MIN_SHARE * count,
        )


def _check_steering(results: Path) -> Iterator[Verdict]:
    for suite, name in SUITES.items():
        path = results / name / f"{STEERING_NAME}.json"
        target = f"seen {suite}: steering margin above 0"
        if not path.exists():
            yield Verdict(target, "-", "python -m training.evaluation.seen_steering", None)
            continue
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"].values()
        steered = sum(task["margin"]["value"] > 0 for task in tasks)
        measured = f"on {steered} of {len(tasks)} tasks"
        yield Verdict(target, measured, "on all", steered == len(tasks))


def _check_unseen(results: Path) -> Iterator[Verdict]:
    for suite in UNSEEN_DIRS:
        found = read_unseen(suite, results)
        if found is None:
            yield Verdict(f"unseen {suite}", "-", "icm-lora unseen", None)
            continue
        for target in list_unseen_targets(suite, found):
            yield Verdict(*target)


def _check_in_distribution(results: Path) -> Iterator[Verdict]:
    for suite, name in SUITES.items():
        path = results / name / "acceptance.json"
        if not path.exists():
            job = "python -m training.evaluation.acceptance"
            yield Verdict(f"in-distribution score, {suite}", "-", job, None)
            continue
        for kind in json.loads(path.read_text(encoding="utf-8"))["kinds"]:
            if kind["min_auroc"] is not None:
                yield Verdict(
                    f"in-distribution score, {suite}: {kind['kind']}",
                    f"AUROC {kind['auroc']:.3f}",
                    f"at least {kind['min_auroc']:g}",
                    kind["auroc"] >= kind["min_auroc"],
                )
