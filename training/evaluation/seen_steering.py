"""Steering margins of the shipped bundles: is it what the words say that makes an adapter good?

    python -m training.evaluation.seen_steering --out training/results

Every task's data are scored with the adapter of the task's unseen wording, and with adapters of
wrong words: those of every other task, gibberish, none, and the same for all. What the base is
asked stays that of the task. Writes seen_steering.json and seen_steering.md into the folder of
each bundle's results; about 20 minutes of one core each.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import Synthesizer, load_synthesizer
from training.checkpoint import write_text
from training.evaluation.bundle_base import open_bundle_base
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.statistics import Resampled
from training.evaluation.steering import (
    WRONG_KINDS,
    SteeringMargin,
    decode_words,
    list_wrong_descriptions,
    measure_steering,
)
from training.evaluation.unseen_suites import DetectionSuite, TextSuite, UnseenSuite
from training.pipeline import describe_commit
from training.progress import Report, show_progress
from training.shipped import BUNDLES_DIR, SUITES
from training.task_vectors import AnyTask
from training.tasks.detection import load_detection_data
from training.tasks.text import load_text_tasks

NUM_WINDOWS = 40
WINDOW_TOKENS = 65
RESULT_NAME = "seen_steering"


def measure_margins(
    synthesizer: Synthesizer,
    suite: UnseenSuite,
    attachment: Attachment,
    tasks: Sequence[AnyTask],
    report: Report,
) -> dict[str, SteeringMargin]:
    """Margin of every task.

    Args:
        synthesizer: of the bundle.
        suite: how a task is scored.
        attachment: to the suite's base.
        tasks: of the bundle.
        report: called after every score.
    """

    @cache
    def decode(words: str) -> Float[Tensor, " num_params"]:
        return decode_words(synthesizer, words).float()

    num_scores = 0

    def score(task: AnyTask, words: str) -> Resampled:
        nonlocal num_scores
        num_scores += 1
        scored = suite.resample(suite.score(attachment, task, decode(words)))
        report(num_scores)
        return scored

    told = {task.name: task.heldout_descriptions[0] for task in tasks}
    return {
        task.name: measure_steering(
            score(task, told[task.name]),
            {
                kind: [score(task, words) for words in wrong]
                for kind, wrong in list_wrong_descriptions(task.name, told).items()
            },
        )
        for task in tasks
    }


def count_scores(tasks: Sequence[AnyTask]) -> int:
    """Of all tasks together."""
    told = {task.name: task.heldout_descriptions[0] for task in tasks}
    wrong = (list_wrong_descriptions(name, told).values() for name in told)
    return sum(1 + sum(map(len, kinds)) for kinds in wrong)


def render_table(margins: Mapping[str, SteeringMargin], unit: str) -> str:
    """Markdown, a row a task."""
    lines = [
        f"| task | margin, {unit} (95% CI) | best wrong words | true | "
        + " | ".join(WRONG_KINDS)
        + " |",
        "|---|--:|---|" + "--:|" * (1 + len(WRONG_KINDS)),
    ]
    for name, found in margins.items():
        true = found.margin.value + found.scores[found.best_wrong]
        shown = [true, *(found.scores[kind] for kind in WRONG_KINDS)]
        margin = found.margin
        lines.append(
            f"| {name} | {margin.value:+.3f} ({margin.low:+.3f} to {margin.high:+.3f}) "
            f"| {found.best_wrong} | " + " | ".join(f"{abs(value):.3f}" for value in shown) + " |"
        )
    above = sum(found.margin.value > 0 for found in margins.values())
    clear = sum(found.margin.low > 0 for found in margins.values())
    lines += [
        "",
        f"Above 0 on {above} of {len(margins)} tasks, clearly (the interval is) on {clear}.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both shipped bundles, or one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles' results")
    parser.add_argument("--suite", choices=SUITES, help="one bundle alone (default: both)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    for name in [given.suite] if given.suite else SUITES:
        _measure_bundle(name, given.out / SUITES[name])


def _measure_bundle(suite_name: str, folder: Path) -> None:
    synthesizer = load_synthesizer(BUNDLES_DIR / SUITES[suite_name])
    bundle = synthesizer.bundle
    base, recipe = open_bundle_base(bundle)
    names = [task.name for task in bundle.tasks]
    suite: UnseenSuite
    tasks: Sequence[AnyTask]
    if suite_name == "text":
        suite = TextSuite(base, NUM_WINDOWS, WINDOW_TOKENS)
        tasks = load_text_tasks(recipe.tasks.source, names)
    else:
        data = load_detection_data(recipe.tasks.source, names)
        suite, tasks = DetectionSuite(base, data), data.tasks
    attachment = Attachment(base.model, bundle.bases)
    with show_progress(f"steering {suite_name}", count_scores(tasks)) as report:
        margins = measure_margins(synthesizer, suite, attachment, tasks, report)
    document = {
        "bundle": name_bundle(bundle),
        "commit": describe_commit(),
        "hardware": describe_hardware(),
        "settings": dict(suite.settings),
        "unit": suite.unit,
        "tasks": {name: asdict(margin) for name, margin in margins.items()},
    }
    write_text(folder / f"{RESULT_NAME}.json", json.dumps(document, indent=1) + "\n")
    head = (
        f"Bundle `{bundle.name}` {bundle.version} (`{bundle.digest[:12]}`): "
        + ", ".join(f"`{key}` {value}" for key, value in suite.settings.items())
        + ".\n\n"
    )
    table = head + render_table(margins, suite.unit) + "\n"
    write_text(folder / f"{RESULT_NAME}.md", table)
    print(table)


if __name__ == "__main__":
    main()
