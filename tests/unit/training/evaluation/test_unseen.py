"""Unseen tasks: their family is left out, scores are kept, and shares say who is ahead."""

import json
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from service.errors import InvalidInputError
from service.synthesis.attachment import Attachment
from tests.fixtures.tiny_open_clip import TinyOpenClip
from tests.fixtures.tiny_training import make_recipe
from tests.unit.training.evaluation.test_average_precision import draw_scenes
from training.baselines import TrainingTasks
from training.baselines.multi_task import MultiTask
from training.baselines.soup import Soup
from training.cli import main
from training.evaluation.average_precision import score_category, score_scenes
from training.evaluation.boxes import find_boxes
from training.evaluation.run import evaluate_unseen
from training.evaluation.steering import CONSTANT
from training.evaluation.text import GIBBERISH, sum_window_nll
from training.evaluation.unseen import (
    WAIT_SECONDS,
    WRONG,
    Method,
    UnseenEvaluation,
    UnseenSettings,
)
from training.evaluation.unseen_methods import build_method
from training.evaluation.unseen_shares import summarize_unseen
from training.evaluation.unseen_suites import DetectionSuite, TextSuite, keep_draws
from training.pipeline import Pipeline
from training.recipe import Recipe
from training.run_dir import RunDir
from training.tasks.text import TextTask
from training.through_base import ThroughBase

SETTINGS = UnseenSettings()
SIZE = (4, 9)
"""Windows, and tokens of each."""


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
        functional={
            "num_steps": 4,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "contrast_weight": 1.0,
        },
    )
    opened = RunDir.open(tmp_path_factory.mktemp("run"), recipe)
    Pipeline(opened).fine_tune_adapters()
    return opened


@pytest.fixture(autouse=True, scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICM_LORA_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def open_job(
    run: RunDir, methods: Mapping[str, Method], settings: UnseenSettings = SETTINGS
) -> UnseenEvaluation:
    pipeline = Pipeline(run)
    return UnseenEvaluation(pipeline, methods, TextSuite(pipeline.base, *SIZE), settings)


def score(
    run: RunDir,
    build: Callable[[], Soup],
    settings: UnseenSettings = SETTINGS,
    **options: int,
) -> dict[str, dict[str, Tensor]]:
    method = Method(lambda _: build(), options)
    job = open_job(run, {"soup": method}, settings)
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


def test_methods_learn_through_a_base_that_reads_nothing_of_the_tasks_left_out(
    run: RunDir,
) -> None:
    seen = []

    def build(through_base: ThroughBase) -> Soup:
        seen.append(through_base.unseen)
        return Soup()

    open_job(run, {"soup": Method(build, {"unseen": 1})}).score(lambda step, **_: None)
    names = ["unicode_names", "html_entities", "python_reference"]
    assert sorted(seen, key=str) == sorted((frozenset({name}) for name in names), key=str)


def test_what_draws_nothing_is_fitted_once_for_all_seeds(run: RunDir) -> None:
    fits = {}
    for seeded in (True, False):
        Spy.seen.clear()
        method = Method(lambda _: Spy(), {"once": int(seeded)}, seeded=seeded)
        job = open_job(run, {"soup": method}, replace(SETTINGS, seeds=(3, 5)))
        scores = job.score(lambda step, **_: None)
        fits[seeded] = len(Spy.seen)
        for each in scores.values():
            assert torch.equal(each["soup.3"], each["soup.5"])
            assert torch.equal(each["soup.3.gibberish"], each["soup.5.gibberish"])
    assert fits == {True: 6, False: 3}


def test_processes_share_the_parts(run: RunDir) -> None:
    """What another one has claimed is left to it, and read when it is done."""
    Spy.seen.clear()
    job = open_job(run, {"soup": Method(lambda _: Spy(), {"shared": 1})})
    folder = job._find_folder({"shared": 1, "num_folds": 3})
    left = threading.Event()

    def claim_a_while() -> None:
        with run.claim(f"unseen.{folder.name}.soup.0.1") as mine:
            assert mine
            left.set()
            time.sleep(1.5 * WAIT_SECONDS)
            assert len(Spy.seen) == 2  # the two other folds

    with ThreadPoolExecutor() as pool:
        other = pool.submit(claim_a_while)
        left.wait()
        scores = job.score(lambda step, **_: None)
        other.result()
    assert len(Spy.seen) == 3  # the claim ended without a result: it is made here
    assert all(set(each) == set(job.labels) for each in scores.values())


def test_a_variant_behind_a_prompt_has_the_same_adapters(run: RunDir) -> None:
    Spy.seen.clear()
    plain = Method(lambda _: Spy(), {"variants": 1})
    variants = {
        f"soup+{prompt}": replace(plain, prompt=prompt) for prompt in ("description", "examples")
    }
    job = open_job(run, {**variants, "soup": plain})
    scores = job.score(lambda step, **_: None)
    assert len(Spy.seen) == 3  # once a fold
    attachment = Attachment(job.pipeline.base.model, job.pipeline.bases)
    task = job.pipeline.tasks[0]
    soup = job.training_tasks.without(task.name).own_adapters.mean(0).half().float()
    other = next(each for each in job.pipeline.tasks if each.name != task.name)
    for label, prompt, words in (
        ("soup.0", None, None),
        ("soup+examples.0", "examples", None),
        ("soup+examples.0.gibberish", "examples", None),
        ("soup+description.0", "description", task.heldout_descriptions[0]),
        ("soup+description.0.gibberish", "description", GIBBERISH),
        ("soup+description.0.constant", "description", CONSTANT),
        ("soup+description.0.other", "description", other.heldout_descriptions[0]),
    ):
        expected = job.suite.score(attachment, task, soup, prompt, words)
        torch.testing.assert_close(scores[task.name][label], expected)
    told = [scores[task.name][label] for label in scores[task.name] if "+description" in label]
    assert len({float(score.sum()) for score in told}) == len(told) == 4
    assert "soup.0.constant" not in scores[task.name]  # the first method alone is told these


def test_detection_tasks_are_scored_on_the_test_scenes(
    tiny_detection_recipe: Recipe, tmp_path: Path
) -> None:
    pipeline = Pipeline(RunDir.open(tmp_path, tiny_detection_recipe))
    pipeline.fine_tune_adapters()
    assert pipeline.detection is not None
    suite = DetectionSuite(pipeline.base, pipeline.detection)
    job = UnseenEvaluation(pipeline, {"soup": Method(lambda _: Soup())}, suite, SETTINGS)
    scores = job.score(lambda step, **_: None)
    labels = {"base", "description", "own.0", "soup.0", *(f"soup.0.{kind}" for kind in WRONG)}
    assert {name: set(each) for name, each in scores.items()} == {"chair": labels, "sofa": labels}
    attachment = Attachment(pipeline.base.model, pipeline.bases)
    other = job.training_tasks.without("sofa").own_adapters[0].half().float()
    sofa = next(task for task in pipeline.tasks if task.name == "sofa")
    torch.testing.assert_close(scores["sofa"]["soup.0"], suite.score(attachment, sofa, other))
    asked = []
    for label, words in (
        ("base", sofa.descriptions[0]),
        ("description", sofa.heldout_descriptions[0]),
    ):
        found = find_boxes(pipeline.base, attachment, None, suite._features, words)
        asked.append(found)
        scored = score_category(found, pipeline.detection.test.objects, "sofa").matches50
        torch.testing.assert_close(scores["sofa"][label], keep_draws(scored))
    assert asked[0] != asked[1]
    with pytest.raises(InvalidInputError, match="detection reads its words anyway"):
        evaluate_unseen(
            pipeline.run, ["soup+description"], SETTINGS, num_windows=1, window_tokens=9, out=None
        )


def test_detection_shares_are_of_ap_on_the_same_draws(
    tiny_detection_recipe: Recipe, tmp_path: Path
) -> None:
    pipeline = Pipeline(RunDir.open(tmp_path, tiny_detection_recipe))
    assert pipeline.detection is not None
    suite = DetectionSuite(pipeline.base, pipeline.detection)
    found, scenes = draw_scenes(0)
    parts = [[] for _ in scenes], found, [boxes if i % 2 else [] for i, boxes in enumerate(found)]
    base, own, generated = (keep_draws(score_scenes(boxes, scenes).matches50) for boxes in parts)
    share = suite.measure_share(base, [own], [generated]).share
    assert share is not None
    assert share.value == pytest.approx(float(generated[0] / own[0]))
    assert 0 < share.low < share.value < share.high < 1
    assert suite.measure_share(base, [base], [generated]).share is None
    assert suite.read([own, base]) == pytest.approx(float(own[0] + base[0]) / 2)
    ahead = suite.compare([own, own], [generated])
    assert ahead.value == pytest.approx(float(own[0] - generated[0]))
    assert 0 < ahead.low < ahead.value


def test_scores_are_those_of_what_they_name(run: RunDir) -> None:
    scores = score(run, Soup)["html_entities"]
    job = open_job(run, {})
    pipeline = job.pipeline
    task = next(task for task in pipeline.tasks if task.name == "html_entities")
    assert isinstance(task, TextTask)
    assert isinstance(job.suite, TextSuite)
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
        expected = sum_window_nll(pipeline.base, attachment, rounded, job.suite.cut(task))
        torch.testing.assert_close(scores[label], expected)
    assert not torch.allclose(scores["description"], scores["base"])
    assert not torch.allclose(scores["examples"], scores["description"])


def test_shares_and_outcomes_are_of_the_judged_method(run: RunDir) -> None:
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
        "ours.0.constant": base,
        "ours.0.other": own + 35,
        "soup.0": own + 60,
        "soup.0.gibberish": own + 60,
    }
    suite = TextSuite(Pipeline(run).base, num_windows=40, window_tokens=33)
    results = summarize_unseen(
        {"a": task, "b": task}, {"a": "x", "b": "y"}, ["ours", "soup"], suite, [0], [0, 1]
    )
    shares = {result.name: result.share.mean.value for result in results}
    assert shares == pytest.approx({"examples": 1.0, "ours": 0.75, "soup": 0.4, "description": 0.0})
    assert [result.name for result in results] == ["examples", "ours", "soup", "description"]
    examples, ours, soup, _ = results
    assert suite.read([own - 5, own + 5]) == pytest.approx(float(own.mean()) / 32)
    assert ours.score == pytest.approx(float(own.mean() + 25) / 32)
    assert ours.better_by is None
    assert soup.better_by is not None
    assert soup.better_by.value == pytest.approx(35 / 32)
    assert soup.better_by.low == pytest.approx(35 / 32)
    assert ours.gibberish is not None
    assert ours.gibberish.mean.value == pytest.approx(0.1)
    assert (ours.behind, ours.outcomes) == (None, None)
    assert ours.margins == pytest.approx({"a": 0.1, "b": 0.1})
    assert soup.margins is None
    assert ours.tasks == pytest.approx({"a": 0.75, "b": 0.75})
    assert soup.behind is not None
    assert soup.behind.low == pytest.approx(0.35)
    assert soup.outcomes is not None
    assert (soup.outcomes.wins, soup.outcomes.losses) == (2, 0)
    assert examples.outcomes is not None
    assert examples.outcomes.losses == 2


def test_the_multi_task_adapter_learns_more_slowly_than_a_fine_tuning(run: RunDir) -> None:
    method = build_method("multi_task", run.recipe)
    with Pipeline(run).open_through_base(2, seed=0) as through_base:
        built = method.build(through_base)
    assert isinstance(built, MultiTask)
    assert built.learning_rate == run.recipe.finetune.learning_rate / 4
    assert built.num_steps == 4


def test_the_command_writes_a_table(run: RunDir, tmp_path: Path) -> None:
    size = ["--windows", "12", "--window-tokens", "9", "--folds", "3"]
    names = [
        "in_context",
        "in_context+description",
        "in_context+examples",
        "in_context_functional",
        "in_context_contrastive",
        "soup",
        "multi_task",
        "greedy_soup",
    ]
    main(["unseen", str(run.root), "--methods", *names, *size, "--out", str(tmp_path)])
    body = json.loads((tmp_path / "unseen.json").read_text())
    assert {row["name"] for row in body["results"]} == {*names, "description", "examples"}
    assert "| in_context |" in (tmp_path / "unseen.md").read_text()
    assert (tmp_path / "unseen.png").stat().st_size > 5_000
