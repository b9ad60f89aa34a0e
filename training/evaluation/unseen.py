"""Unseen tasks: each is scored by methods that never saw its family.

A fold leaves one family out, or some. Every method is fitted on the other families' adapters,
descriptions and training data and then gets a description of each task left out, in words that no
training has seen. Scores are kept one by one in the run's folder, so the job resumes where it was
stopped, several processes may share it, and a method that is added later costs only its own part.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import VECTOR_DTYPE
from service.synthesis.task_encoder import build_task_encoder
from training.baselines import Baseline, TrainingTasks
from training.checkpoint import read_tensors, write_tensors
from training.evaluation.steering import CONSTANT
from training.evaluation.text import GIBBERISH
from training.evaluation.unseen_suites import Score, UnseenSuite
from training.pipeline import Pipeline
from training.progress import Report
from training.task_vectors import AnyTask, encoder_spec
from training.through_base import ThroughBase

WRONG = ("gibberish", "constant", "other")
"""Kinds of wrong words: no task's, every task's, and those of a task of another family."""

WAIT_SECONDS = 1.0
"""Between two looks at what other processes have claimed."""


@dataclass(frozen=True)
class Method:
    """How adapters for unseen tasks are made.

    Attributes:
        build: an unfitted one, which may learn through the base.
        options: all that its adapters depend on besides tasks and seed, as JSON: scores that were
            kept under other options are not read.
        prompt: of the suite's, what stands before every window as well, or nothing. Methods that
            are named alike up to a `+` differ in this alone, and are fitted once.
        seeded: whether it depends on its seed; if not, it is fitted and scored once for all.
    """

    build: Callable[[ThroughBase], Baseline]
    options: Mapping[str, Any] = field(default_factory=dict)
    prompt: str | None = None
    seeded: bool = True


@dataclass(frozen=True)
class UnseenSettings:
    """How methods are fitted.

    Attributes:
        seeds: each method is fitted once with each.
        num_folds: families are left out in so many parts; each by itself where None.
    """

    seeds: tuple[int, ...] = (0,)
    num_folds: int | None = None


@dataclass
class UnseenEvaluation:
    """Scores of all methods on all tasks of a run, each task as an unseen one.

    Labels of scores: `base`, `own.SEED` (a fine-tuning), the suite's prompts, and `METHOD.SEED`
    with `METHOD.SEED.gibberish` beside it, for the first method one of each kind in `WRONG`.

    Attributes:
        pipeline: of a run whose adapters are all there.
        methods: by name.
        suite: how a task is scored.
        settings: how methods are fitted.
    """

    pipeline: Pipeline
    methods: Mapping[str, Method]
    suite: UnseenSuite
    settings: UnseenSettings

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the scores that every task has in the end."""
        fitted = [f"{name}.{seed}" for name in self.methods for seed in self.settings.seeds]
        made = [label for each in fitted for label in (each, f"{each}.gibberish")]
        wrong = [f"{self.judged}.{seed}.{kind}" for seed in self.settings.seeds for kind in WRONG]
        return (*self._references, *dict.fromkeys([*made, *wrong]))

    @property
    def judged(self) -> str:
        """The method that the others are compared with: the first."""
        return next(iter(self.methods))

    @property
    def num_scores(self) -> int:
        """Passes over a task's held-out data in all."""
        return len(self.labels) * len(self.pipeline.tasks)

    def score(self, report: Report) -> dict[str, dict[str, Score]]:
        """Scores by task and label; those that are kept are read.

        Raises:
            InvalidRecipeError: an adapter of the run is missing.
            InvalidInputError: the run's tasks are of one family.
        """
        batch_size = self.pipeline.run.recipe.finetune.batch_size
        with self.pipeline.open_through_base(batch_size, seed=0) as through_base:
            parts = [*self._list_parts(through_base)]
            self._share(parts, through_base.attachment, report)
        scores: dict[str, dict[str, Score]] = {task.name: {} for task in self.pipeline.tasks}
        for part in parts:
            for each in part.list_scores():
                scores[each.task.name][each.label] = read_tensors(each.path)[0]["score"]
        return scores

    def _share(self, parts: "Sequence[_Part]", attachment: Attachment, report: Report) -> None:
        """Makes what is missing of the parts that no other process makes, until none is missing."""
        done = 0
        while parts:
            left = []
            for part in parts:
                with self.pipeline.run.claim(f"unseen.{part.name}") as mine:
                    if not mine:
                        left.append(part)
                        continue
                    for each in part.list_scores():
                        if not each.path.exists():
                            self._write(each, attachment)
                        done += 1
                        report(done)
            if left:
                time.sleep(WAIT_SECONDS)
            parts = left

    def _list_parts(self, through_base: ThroughBase) -> "Iterator[_Part]":
        """Of every task what needs no other one; of every fold each method under each seed."""
        folder = self._find_folder({})
        for task in self.pipeline.tasks:
            list_scores = partial(self._list_references, task, folder)
            yield _Part(f"{folder.name}.{task.name}", list_scores)
        families = list(dict.fromkeys(self.training_tasks.families))
        num_folds = min(self.settings.num_folds or len(families), len(families))
        for first in range(num_folds):
            rest = self.training_tasks.without(*families[first::num_folds])
            unseen = {task.name for task in self.pipeline.tasks} - {*rest.names}
            through_rest = through_base.without(unseen)
            for name, variants in self._group_variants().items():
                method = next(iter(variants.values()))
                folder = self._find_folder({**method.options, "num_folds": num_folds})
                for seed in self.settings.seeds:
                    fit = partial(_Fitted, method, rest, seed, through_rest)
                    list_scores = partial(self._list_fitted, fit, variants, seed, folder)
                    yield _Part(f"{folder.name}.{name}.{seed}.{first}", list_scores)

    def _group_variants(self) -> dict[str, dict[str, Method]]:
        """Methods by what they are named up to a `+`."""
        groups: dict[str, dict[str, Method]] = {}
        for name, method in self.methods.items():
            groups.setdefault(name.partition("+")[0], {})[name] = method
        return groups

    @property
    def _references(self) -> Mapping[str, int | str | None]:
        """Labels of what needs no other task: the base, fine-tunings by seed, prompts by name."""
        own = {f"own.{seed}": seed for seed in self.pipeline.run.recipe.finetune.seeds}
        return {"base": None, **own, **{prompt: prompt for prompt in self.suite.prompts}}

    def _list_references(self, task: AnyTask, folder: Path) -> "Iterator[_Score]":
        for label, told in self._references.items():
            path = folder / f"{task.name}.{label}.safetensors"
            make = None
            if isinstance(told, int):
                make = partial(_read_own, self.pipeline.run.adapter(task.name, told))
            yield _Score(task, label, path, make, told if isinstance(told, str) else None)

    def _list_fitted(
        self,
        fit: "Callable[[], _Fitted]",
        variants: Mapping[str, Method],
        seed: int,
        folder: Path,
    ) -> "Iterator[_Score]":
        """Of the tasks that the method is not fitted on."""
        fitted = fit()
        kept_as = seed if fitted.method.seeded else self.settings.seeds[0]
        for task in self.pipeline.tasks:
            if task.name in fitted.tasks.names:
                continue
            for kind, words in self._tell(task).items():
                told = [
                    name for name in variants if kind in ("", "gibberish") or name == self.judged
                ]
                labels, kept = (
                    [f"{name}.{number}.{kind}".rstrip(".") for name in told]
                    for number in (seed, kept_as)
                )
                paths = [folder / f"{task.name}.{label}.safetensors" for label in kept]
                make = partial(_read_or_make, paths, fitted, self.unseen_vectors[words])
                for name, label, path in zip(told, labels, paths, strict=True):
                    yield _Score(task, label, path, make, variants[name].prompt, words)

    def _tell(self, task: AnyTask) -> dict[str, str]:
        """Words that a task's adapters are made from: under `""` the true ones, then wrong ones."""
        tasks, families = self.pipeline.tasks, self.pipeline.families
        own = tasks.index(task)
        turn = [(own + step) % len(tasks) for step in range(1, len(tasks))]
        other = next(tasks[index] for index in turn if families[index] != families[own])
        wrong = (GIBBERISH, CONSTANT, other.heldout_descriptions[0])
        return {"": task.heldout_descriptions[0], **dict(zip(WRONG, wrong, strict=True))}

    def _write(self, score: "_Score", attachment: Attachment) -> None:
        vector = None if score.make is None else score.make().to(VECTOR_DTYPE)
        served = None if vector is None else vector.float()  # rounded as it would be served
        found = self.suite.score(attachment, score.task, served, score.prompt, score.words)
        tensors = {"score": found}
        if vector is not None:
            tensors["vector"] = vector
        write_tensors(score.path, tensors)

    @cached_property
    def training_tasks(self) -> TrainingTasks:
        """All tasks, with all adapters."""
        pipeline = self.pipeline
        families = {
            task.name: name for task, name in zip(pipeline.tasks, pipeline.families, strict=True)
        }
        return TrainingTasks.from_stages(
            pipeline.bases.layout,
            pipeline.read_checkpoints(),
            pipeline.encode_task_vectors(),
            families,
        )

    @cached_property
    def unseen_vectors(self) -> Mapping[str, Float[Tensor, " dim"]]:
        """Task vectors of all words that adapters are made from, by words.

        They are kept in the run's folder, so that scoring elsewhere needs no encoder.
        """
        recipe = self.pipeline.run.recipe
        tasks = self.pipeline.tasks
        told = [*(task.heldout_descriptions[0] for task in tasks), GIBBERISH, CONSTANT]
        digest = _digest([recipe.stage_digest("base", "encoder"), told])
        path = self.pipeline.run.root / "unseen" / f"task_vectors.{digest}.safetensors"
        if not path.exists():
            encoder = build_task_encoder(encoder_spec(recipe.encoder, recipe.base))
            write_tensors(path, {"rows": encoder.encode(told)})
        return dict(zip(told, read_tensors(path)[0]["rows"], strict=True))

    def _find_folder(self, options: Mapping[str, Any]) -> Path:
        """Scores of other held-out data, adapters or options lie in other folders."""
        sections = ("base", "detector", "detection", "tasks", "adapter", "finetune", "encoder")
        adapters = self.pipeline.run.recipe.stage_digest(*sections)
        digest = _digest([adapters, dict(self.suite.settings), options])
        return self.pipeline.run.root / "unseen" / digest


@dataclass(frozen=True)
class _Score:
    """A task under a label, where the score is kept, and what makes adapter and prompt."""

    task: AnyTask
    label: str
    path: Path
    make: Callable[[], Float[Tensor, " num_params"]] | None
    prompt: str | None = None
    words: str | None = None


@dataclass(frozen=True)
class _Part:
    """Scores that one process makes: a method is fitted once for all of them, and then dropped."""

    name: str
    list_scores: Callable[[], Iterator[_Score]]


@dataclass
class _Fitted:
    """A method that is fitted when it is first needed."""

    method: Method
    tasks: TrainingTasks
    seed: int
    through_base: ThroughBase

    @cached_property
    def _baseline(self) -> Baseline:
        baseline = self.method.build(self.through_base)
        baseline.fit(self.tasks, self.seed)
        return baseline

    def generate(self, task_vector: Float[Tensor, " dim"]) -> Float[Tensor, " num_params"]:
        """The adapter of a description."""
        return self._baseline.generate(task_vector, self.seed)


def _read_or_make(
    paths: Sequence[Path], fitted: _Fitted, task_vector: Float[Tensor, " dim"]
) -> Float[Tensor, " num_params"]:
    """The adapter of a description, from a score that is kept where there is one."""
    for path in paths:
        if path.exists():
            return read_tensors(path)[0]["vector"]
    return fitted.generate(task_vector)


def _read_own(path: Path) -> Float[Tensor, " num_params"]:
    """Mean late checkpoint of one fine-tuning."""
    return read_tensors(path)[0]["checkpoints"].float().mean(0)


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
