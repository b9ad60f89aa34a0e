"""Memorisation audit of the shipped bundles: is a generated adapter a copy of a trained one?

    python -m training.evaluation.audit --out training/results

Every task's adapter, generated from an unseen wording, is compared as an update of the base with
all own adapters, and by what it gets wrong with its task's own adapter and the nearest other one.
Writes audit.json and audit.md into the folder of each bundle's results.
"""

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from service.inference.base_model import BaseModel
from service.inference.box_decoding import LocatedBox
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import Bundle
from service.synthesis.synthesizer import Synthesizer, load_synthesizer
from training.adapters import cut_windows, tokenize_documents
from training.checkpoint import read_tensors, write_text
from training.detection_examples import encode_scenes
from training.evaluation.average_precision import score_category
from training.evaluation.boxes import find_boxes
from training.evaluation.bundle_base import open_bundle_base
from training.evaluation.memorisation import find_nearest_checkpoint, measure_iou
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.updates import UpdateError, compare_beyond_mean, compare_updates
from training.pipeline import describe_commit
from training.progress import Report, show_progress
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES
from training.task_vectors import AnyTask
from training.tasks.detection import load_detection_data
from training.tasks.detection_task import Annotation, DetectionTask, SceneSource
from training.tasks.text import TextTask, load_text_tasks

NUM_WINDOWS = 20
WINDOW_TOKENS = 65
BATCH_WINDOWS = 10

FindErrors = Callable[[AnyTask, Float[Tensor, " num_params"]], Bool[Tensor, " items"]]
"""Which of a task's held-out items an adapter gets wrong."""


@dataclass(frozen=True)
class AuditedTask:
    """A generated adapter beside trained ones.

    Attributes:
        task: its name.
        own: its update against that of the task's own adapter.
        beyond_mean: the same, less that of the mean adapter.
        nearest: task of the own adapter whose update is nearest.
        other: the nearest one of another task.
        other_distance: to that, relative to the generated update's norm.
        own_iou: Jaccard index of its errors and those of the task's own adapter.
        other_iou: the same of the nearest other one.
    """

    task: str
    own: UpdateError
    beyond_mean: UpdateError
    nearest: str
    other: str
    other_distance: float
    own_iou: float
    other_iou: float


def audit_tasks(
    synthesizer: Synthesizer,
    own: Mapping[str, Float[Tensor, " num_params"]],
    tasks: Sequence[AnyTask],
    find_errors: FindErrors,
    report: Report,
) -> list[AuditedTask]:
    """Compares the adapter of each task's first held-out wording; needs two tasks at least."""
    bundle = synthesizer.bundle
    trained = {name: vector.float()[None] for name, vector in own.items()}
    audited = []
    for number, task in enumerate(tasks):
        vector = synthesizer.synthesize_words(task.heldout_descriptions[0]).vector.float()
        mine = trained[task.name][0]
        others = {name: rows for name, rows in trained.items() if name != task.name}
        other = find_nearest_checkpoint(bundle.bases, vector, others)
        errors = find_errors(task, vector)
        audited.append(
            AuditedTask(
                task.name,
                compare_updates(bundle.bases, vector, mine).whole,
                compare_beyond_mean(bundle.bases, vector, mine, bundle.normalizer.mean).whole,
                find_nearest_checkpoint(bundle.bases, vector, trained).task,
                other.task,
                other.relative,
                measure_iou(errors, find_errors(task, mine)),
                measure_iou(errors, find_errors(task, trained[other.task][0])),
            )
        )
        report(number + 1)
    return audited


def find_wrong_tokens(
    base: BaseModel, attachment: Attachment, task: AnyTask, vector: Float[Tensor, " num_params"]
) -> Bool[Tensor, " tokens"]:
    """Tokens of held-out windows that are not the likeliest under an adapter."""
    assert isinstance(task, TextTask)
    tokens = tokenize_documents(base, task.test)
    windows = cut_windows(tokens, NUM_WINDOWS, WINDOW_TOKENS, seed=0).to(base.device)
    attachment.rows.vectors = vector[None].to(base.device, base.dtype)
    wrong = []
    with torch.inference_mode():
        for batch in torch.split(windows, BATCH_WINDOWS):
            guessed = base.model(input_ids=batch, use_cache=False).logits[:, :-1].argmax(-1)
            wrong.append((guessed != batch[:, 1:]).flatten().cpu())
    attachment.rows.vectors = None
    return torch.cat(wrong)


def find_wrong_scenes(
    base: BaseModel,
    attachment: Attachment,
    source: SceneSource,
    features: Float[Tensor, "scenes features rows columns"],
    task: AnyTask,
    vector: Float[Tensor, " num_params"],
) -> Bool[Tensor, " scenes"]:
    """Scenes with the task's object in which an adapter misses one."""
    assert isinstance(task, DetectionTask)
    found = find_boxes(base, attachment, vector, features, task.heldout_descriptions[0])
    return mark_misses(found, source.objects, task.name)


def mark_misses(
    found: Sequence[Sequence[LocatedBox]], objects: Sequence[Sequence[Annotation]], category: str
) -> Bool[Tensor, " scenes"]:
    """Of the scenes with an object of the category, where one is missed at IoU 0.5."""
    matches = score_category(found, objects, category).matches50
    hits = Counter(matches.scene[matches.is_hit].tolist())
    there = Counter(matches.truth_scene.tolist())
    return torch.tensor([hits[scene] < count for scene, count in there.items()])


def render_table(bundle: Bundle, audited: Sequence[AuditedTask]) -> str:
    """Markdown, a row a task."""
    items = "tokens" if bundle.modality == "text" else "scenes with a miss"
    lines = [
        f"Bundle `{bundle.name}` {bundle.version} (`{bundle.digest[:12]}`), generated from unseen "
        f"wordings; errors are {items}.",
        "",
        "| task | relative error, cosine to own | less the mean adapter's | nearest trained "
        "| nearest other: distance | shared errors: own, other |",
        "|---|--:|--:|---|--:|--:|",
    ]
    for each in audited:
        nearest = "own" if each.nearest == each.task else each.nearest
        lines.append(_render_row(each.task, nearest, each.other, _list_numbers(each)))
    means = [statistics.mean(column) for column in zip(*map(_list_numbers, audited), strict=True)]
    num_own = sum(each.nearest == each.task for each in audited)
    lines.append(_render_row("**mean**", f"own: {num_own} of {len(audited)}", "mean", means))
    return "\n".join(lines) + "\n"


def _list_numbers(audited: AuditedTask) -> tuple[float, ...]:
    own, beyond = audited.own, audited.beyond_mean
    updates = (own.relative_error, own.cosine, beyond.relative_error, beyond.cosine)
    return (*updates, audited.other_distance, audited.own_iou, audited.other_iou)


def _render_row(name: str, nearest: str, other: str, numbers: Sequence[float]) -> str:
    error, cosine, less, more, distance, own_iou, other_iou = numbers
    return (
        f"| {name} | {error:.3f}, {cosine:.3f} | {less:+.3f}, {more:+.3f} | {nearest} "
        f"| {other}: {distance:.3f} | {own_iou:.3f}, {other_iou:.3f} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Audits both shipped bundles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles' results")
    out: Path = parser.parse_args(arguments).out
    for suite, name in SUITES.items():
        synthesizer = load_synthesizer(BUNDLES_DIR / name)
        bundle = synthesizer.bundle
        base, recipe = open_bundle_base(bundle)
        own, _ = read_tensors(RESULTS_DIR / name / "own_adapters.safetensors")
        attachment = Attachment(base.model, bundle.bases)
        tasks: Sequence[AnyTask]
        find_errors: FindErrors
        if suite == "text":
            tasks = load_text_tasks(recipe.tasks.source, [task.name for task in bundle.tasks])
            find_errors = partial(find_wrong_tokens, base, attachment)
        else:
            data = load_detection_data(recipe.tasks.source, [task.name for task in bundle.tasks])
            tasks = data.tasks
            features = encode_scenes(base, data.test, range(len(data.test.objects)))
            find_errors = partial(find_wrong_scenes, base, attachment, data.test, features)
        with show_progress(f"audit {suite}", len(tasks)) as report:
            audited = audit_tasks(synthesizer, own, tasks, find_errors, report)
        document = {
            "bundle": name_bundle(bundle),
            "commit": describe_commit(),
            "hardware": describe_hardware(),
            "tasks": [asdict(each) for each in audited],
        }
        write_text(out / name / "audit.json", json.dumps(document, indent=1) + "\n")
        table = render_table(bundle, audited)
        write_text(out / name / "audit.md", table)
        print(table)


if __name__ == "__main__":
    main()
