"""The memorisation audit: copies are seen as copies, errors are those of the adapter."""

import json
from dataclasses import replace

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from service.inference.base_model import load_base_model
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from tests.fixtures.kernel import normal
from tests.fixtures.tiny_bundle import TinyBundle
from tests.unit.training.evaluation.test_average_precision import draw_scenes, found
from training.adapters import cut_windows, tokenize_documents
from training.evaluation.audit import (
    NUM_WINDOWS,
    WINDOW_TOKENS,
    AuditedTask,
    audit_tasks,
    find_wrong_tokens,
    mark_misses,
    render_table,
)
from training.evaluation.updates import UpdateError
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES
from training.task_vectors import AnyTask
from training.tasks.text import TextTask

DOCUMENTS = tuple(
    f"Document {number} tells of {number + 7} rivers and a hill." for number in range(400)
)


def make_task(name: str, words: str) -> TextTask:
    return TextTask(name, name, (f"{words} Please.",), (words,), DOCUMENTS, DOCUMENTS)


def test_a_generated_copy_is_nearest_to_what_it_copies(tiny_bundle: TinyBundle) -> None:
    synthesizer = tiny_bundle.synthesizer
    bundle = synthesizer.bundle
    tasks = [make_task("first", "Write a poem."), make_task("second", "Write a law.")]
    copied = synthesizer.synthesize_words("Write a poem.").vector.float()
    apart = copied + normal(bundle.layout.num_params, seed=1)
    near = copied * 1.01
    errors = {"first": [True, True, False, False], "second": [False, True, True, False]}

    def find_errors(task: AnyTask, vector: Tensor) -> Tensor:
        return torch.tensor(errors["second" if torch.equal(vector, apart) else "first"])

    own = {"first": copied, "second": apart, "third": near}
    steps: list[int] = []
    audited = audit_tasks(
        synthesizer, own, tasks, find_errors, lambda step, **_: steps.append(step)
    )
    assert steps == [1, 2]
    first, second = audited
    assert first.own.relative_error == 0
    assert first.own.cosine == pytest.approx(1.0)
    assert first.beyond_mean.relative_error < 0
    assert (first.nearest, first.other) == ("first", "third")
    assert first.other_distance == pytest.approx(0.01, rel=1e-3)
    assert (first.own_iou, first.other_iou) == (1.0, 1.0)
    assert second.nearest != "second"
    assert second.own_iou == pytest.approx(1 / 3)


def test_wrong_tokens_are_those_that_are_not_the_likeliest(tiny_bundle: TinyBundle) -> None:
    bundle = tiny_bundle.synthesizer.bundle
    base = load_base_model(bundle.base_reference, dtype="float32", cache_dir=tiny_bundle.cache_dir)
    task = make_task("words", "Write words.")
    attachment = Attachment(base.model, bundle.bases)
    vector = normal(bundle.layout.num_params, seed=3)
    wrong = find_wrong_tokens(base, attachment, task, vector)
    windows = cut_windows(tokenize_documents(base, task.test), NUM_WINDOWS, WINDOW_TOKENS, 0)
    attachment.rows.vectors = vector[None]
    expected = []
    for window in windows:
        likeliest = base.model(input_ids=window[None]).logits[0, :-1].argmax(-1)
        expected += (likeliest != window[1:]).tolist()
    assert wrong.tolist() == expected
    plain = find_wrong_tokens(base, attachment, task, torch.zeros_like(vector))
    assert not torch.equal(wrong, plain)


def test_scenes_are_wrong_where_an_object_is_missed() -> None:
    _, scenes = draw_scenes(0)
    boxes = [[found(each.box, 0.9) for each in scene] for scene in scenes]
    broken = [number for number, scene in enumerate(scenes) if len(scene) > 1][::2]
    for number in broken:
        boxes[number].pop()
    there = [number for number, scene in enumerate(scenes) if scene]
    missed = mark_misses(boxes, scenes, "ball")
    assert missed.tolist() == [number in broken for number in there]
    assert 0 < len(broken) < len(there)


def test_the_table_has_a_row_a_task_and_the_means(tiny_bundle: TinyBundle) -> None:
    one = AuditedTask("a", UpdateError(0.1, 0.9), UpdateError(-0.4, 0.3), "a", "b", 0.8, 0.95, 0.5)
    two = replace(one, task="b", nearest="a", other="a", own_iou=0.85)
    lines = render_table(tiny_bundle.synthesizer.bundle, [one, two]).splitlines()
    assert lines[4] == "| a | 0.100, 0.900 | -0.400, +0.300 | own | b: 0.800 | 0.950, 0.500 |"
    assert lines[-1] == (
        "| **mean** | 0.100, 0.900 | -0.400, +0.300 | own: 1 of 2 | mean: 0.800 | 0.900, 0.500 |"
    )


@pytest.mark.parametrize("name", SUITES.values())
def test_committed_audits_are_of_the_shipped_bundles(name: str) -> None:
    document = json.loads((RESULTS_DIR / name / "audit.json").read_text())
    bundle = read_bundle(BUNDLES_DIR / name)
    assert document["bundle"]["digest"] == bundle.digest
    assert [each["task"] for each in document["tasks"]] == [task.name for task in bundle.tasks]
    audited = TypeAdapter(list[AuditedTask]).validate_python(document["tasks"])
    assert (RESULTS_DIR / name / "audit.md").read_text() == render_table(bundle, audited)
