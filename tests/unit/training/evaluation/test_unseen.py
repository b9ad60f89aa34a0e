"""Unseen tasks: their family is left out, scores are kept, and shares say who is ahead."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from service.synthesis.attachment import Attachment
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from training.baselines import TrainingTasks
from training.baselines.soup import Soup
from training.cli import main
from training.evaluation.text import sum_window_nll
from training.evaluation.unseen import Method, UnseenEvaluation, UnseenSettings
from training.evaluation.unseen_shares import summarize_unseen
from training.pipeline import Pipeline
from training.run_dir import RunDir

SETTINGS = UnseenSettings(num_windows=4, window_tokens=9)


class Spy(Soup):
    """Tells what it is fitted on."""

    seen: ClassVar[list[tuple[str, ...]]] = []

    def fit(self, tasks: TrainingTasks, seed: int) -> None:
        self.seen.append(tasks.names)
        super().fit(tasks, seed)


@pytest.fixture(scope="module")
def run(tiny_open_clip: TinyOpenClip, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    recipe = make_recipe(
        encoder=tiny_open_clip.section,
        generator={"epochs": 2},
        tasks={"names": ["unicode_names", "html_entities", "python_reference"]},
        finetune={"seeds": [0, 1]},
        functional={"num_steps": 4, "batch_size": 2, "learning_rate": 1e-3},
    )
    opened = RunDir.open(tmp_path_factory.mktemp("run"), recipe)
    Pipeline(opened).fine_tune_adapters()
    return opened


@pytest.fixture(autouse=True, scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def score(
    run: RunDir,
    build: Callable[[], Soup],
    settings: UnseenSettings = SETTINGS,
    **options: int,
) -> dict[str, dict[str, Tensor]]:
    method = Method(lambda _: build(), options)
    job = UnseenEvaluation(Pipeline(run), {"soup": method}, settings)
    steps: list[int] = []
    scores = job.score(lambda step, **_: steps.append(step))
    assert steps == list(range(1, job.num_scores + 1))
    for each in scores.values():
        assert set(each) == set(job.labels)
        assert {tuple(nll.shape) for nll in each.values()} == {(4,)}
    return scores


def test_every_task_is_scored_without_itself_and_once(run: RunDir) -> None:
    Spy.seen.clear()
    scores = score(run, Spy)
    names = {"unicode_names", "html_entities", "python_reference"}
    assert {tuple(names - set(seen)) for seen in Spy.seen} == {(name,) for name in names}

    def refuse() -> Soup:
        raise AssertionError("its scores are kept")

    again = score(run, refuse)
    for task, each in scores.items():
        assert all(torch.equal(nll, again[task][label]) for label, nll in each.items())
    with pytest.raises(AssertionError, match="kept"):
        score(run, refuse, other=1)  # under other options they are not


def test_families_are_left_out_in_parts(run: RunDir) -> None:
    Spy.seen.clear()
    score(run, Spy, replace(SETTINGS, num_folds=2))
    assert [len(seen) for seen in Spy.seen] == [1, 2]
    assert len(set(Spy.seen[0] + Spy.seen[1])) == 3


def test_scores_are_those_of_what_they_name(run: RunDir) -> None:
    scores = score(run, Soup)["html_entities"]
    pipeline = Pipeline(run)
    job = UnseenEvaluation(pipeline, {}, SETTINGS)
    task = next(task for task in job.tasks if task.name == "html_entities")
    others = job.training_tasks.without("html_entities").own_adapters
    own = job.training_tasks.checkpoints[job.training_tasks.names.index("html_entities")]
    attachment = Attachment(pipeline.base.model, pipeline.bases)
    for label, vector in (
        ("base", None),
        ("soup.0", others.mean(0)),
        ("soup.0.gibberish", others.mean(0)),
        ("own.0", own[:3].mean(0)),
        ("own.1", own[3:].mean(0)),
    ):
        rounded = None if vector is None else vector.half().float()
        expected = sum_window_nll(pipeline.base, attachment, rounded, job._cut(task))
        torch.testing.assert_close(scores[label], expected)
    assert not torch.allclose(scores["description"], scores["base"])
    assert not torch.allclose(scores["examples"], scores["description"])


def test_shares_and_outcomes_are_of_the_judged_method() -> None:
    windows = torch.arange(40.0)
    base, own = 200 + windows, 100 + windows
    task = {
        "base": base,
        "own.0": own - 5,
        "own.1": own + 5,
        "description": base,
        "examples": own,
        "ours.0": own + 25,
        "ours.0.gibberish": base - 10,
        "soup.0": own + 60,
        "soup.0.gibberish": own + 60,
    }
    settings = UnseenSettings(num_windows=40, window_tokens=33)
    results = summarize_unseen(
        {"a": task, "b": task}, {"a": "x", "b": "y"}, ["ours", "soup"], settings, [0, 1]
    )
    shares = {result.name: result.share.mean.value for result in results}
    assert shares == pytest.approx({"examples": 1.0, "ours": 0.75, "soup": 0.4, "description": 0.0})
    assert [result.name for result in results] == ["examples", "ours", "soup", "description"]
    examples, ours, soup, _ = results
    assert ours.gibberish is not None
    assert ours.gibberish.mean.value == pytest.approx(0.1)
    assert (ours.behind, ours.outcomes) == (None, None)
    assert soup.behind is not None
    assert soup.behind.low == pytest.approx(0.35)
    assert soup.outcomes is not None
    assert (soup.outcomes.wins, soup.outcomes.losses) == (2, 0)
    assert examples.outcomes is not None
    assert examples.outcomes.losses == 2


def test_the_command_writes_a_table(run: RunDir, tmp_path: Path) -> None:
    size = ["--windows", "12", "--window-tokens", "9", "--folds", "3"]
    names = ["in_context", "in_context_functional", "soup", "multi_task", "greedy_soup"]
    main(["unseen", str(run.root), "--methods", *names, *size, "--out", str(tmp_path)])
    body = json.loads((tmp_path / "unseen.json").read_text())
    assert {row["name"] for row in body["results"]} == {*names, "description", "examples"}
    assert "| in_context |" in (tmp_path / "unseen.md").read_text()
