"""Margins of seen tasks: every wrong description is scored on every task's data."""

import pytest

from service.inference.base_model import EMBEDDED_TINY, load_base_model
from service.synthesis.attachment import Attachment
from tests.fixtures.tiny_bundle import TinyBundle
from training.evaluation.seen_steering import count_scores, measure_margins, render_table
from training.evaluation.steering import decode_words, list_wrong_descriptions
from training.evaluation.unseen_suites import TextSuite
from training.tasks.text import load_text_tasks


def test_every_task_is_scored_under_true_and_wrong_words(tiny_bundle: TinyBundle) -> None:
    cache_dir = tiny_bundle.cache_dir
    base = load_base_model(EMBEDDED_TINY, device="cpu", dtype="float32", cache_dir=cache_dir)
    tasks = load_text_tasks("smoke", ["unicode_names", "html_entities"])
    suite = TextSuite(base, num_windows=4, window_tokens=9)
    attachment = Attachment(base.model, tiny_bundle.bundle.bases)
    reports: list[int] = []
    margins = measure_margins(
        tiny_bundle.synthesizer, suite, attachment, tasks, lambda done, **_: reports.append(done)
    )

    assert reports == [*range(1, count_scores(tasks) + 1)]
    told = {task.name: task.heldout_descriptions[0] for task in tasks}
    assert margins.keys() == told.keys()
    for task in tasks:

        def score(words: str) -> float:
            vector = decode_words(tiny_bundle.synthesizer, words).float()
            return -suite.read([suite.score(attachment, task, vector)])  # noqa: B023

        found = margins[task.name]
        wrong = list_wrong_descriptions(task.name, told)
        best = {kind: max(map(score, texts)) for kind, texts in wrong.items()}
        assert dict(found.scores) == pytest.approx(best, rel=1e-5)
        expected = score(told[task.name]) - max(best.values())
        assert found.margin.value == pytest.approx(expected, abs=1e-5)

    above = sum(found.margin.value > 0 for found in margins.values())
    table = render_table(margins, suite.unit)
    assert f"Above 0 on {above} of 2 tasks" in table
    assert "| task | margin, nats a token (95% CI) | best wrong words | true |" in table
