"""Unseen text tasks: each is scored by methods that never saw its family.

A fold leaves one family out, or some. Every method is fitted on the other families' adapters,
descriptions and training texts and then gets a description of each task left out, in words that
no training has seen. Scores are kept one by one in the run's folder, so the job resumes where it
was stopped, and a method that is added later costs only its own part.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidInputError
from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import VECTOR_DTYPE
from service.synthesis.task_encoder import TaskEncoder, build_task_encoder
from training.adapters import cut_windows, tokenize_documents
from training.baselines import Baseline, TrainingTasks
from training.baselines.prompt import prompt_with_description, prompt_with_examples
from training.checkpoint import read_tensors, write_tensors
from training.evaluation.text import GIBBERISH, sum_window_nll
from training.pipeline import Pipeline
from training.progress import Report
from training.task_vectors import encoder_spec
from training.tasks.text import TextTask
from training.through_base import ThroughBase

NUM_EXAMPLES = 8
"""Of the few-shot prompt; they are training texts of the task."""

EXAMPLE_TOKENS = 512
"""Of all examples together."""


@dataclass(frozen=True)
class Method:
    """How adapters for unseen tasks are made.

    Attributes:
        build: an unfitted one, which may learn through the base.
        options: all that its adapters depend on besides tasks and seed, as JSON: scores that were
            kept under other options are not read.
    """

    build: Callable[[ThroughBase], Baseline]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnseenSettings:
    """What the scores depend on, besides the run.

    Attributes:
        num_windows: held-out windows of each task.
        window_tokens: of each; all but the first are scored.
        window_seed: of their choice.
        seeds: each method is fitted once with each.
        num_folds: families are left out in so many parts; each by itself where None.
    """

    num_windows: int
    window_tokens: int
    window_seed: int = 0
    seeds: tuple[int, ...] = (0,)
    num_folds: int | None = None


@dataclass
class UnseenEvaluation:
    """Scores of all methods on all tasks of a run, each task as an unseen one.

    Labels of scores: `base`, `own.SEED` (a fine-tuning), `description` and `examples` (prompts),
    and `METHOD.SEED` with `METHOD.SEED.gibberish` beside it.

    Attributes:
        pipeline: of a run whose adapters are all there.
        methods: by name.
        settings: what is scored.
    """

    pipeline: Pipeline
    methods: Mapping[str, Method]
    settings: UnseenSettings
    _windows: dict[str, Int[Tensor, "windows window_tokens"]] = field(default_factory=dict)

    @property
    def labels(self) -> tuple[str, ...]:
        """Of the scores that every task has in the end."""
        own = [f"own.{seed}" for seed in self.pipeline.run.recipe.finetune.seeds]
        fitted = [f"{name}.{seed}" for name in self.methods for seed in self.settings.seeds]
        made = [label for each in fitted for label in (each, f"{each}.gibberish")]
        return ("base", *own, "description", "examples", *made)

    @property
    def num_scores(self) -> int:
        """Passes over a task's windows in all."""
        return len(self.labels) * len(self.tasks)

    def score(self, report: Report) -> dict[str, dict[str, Float[Tensor, " windows"]]]:
        """NLL in nats of every window, by task and label; scores that are kept are read.

        Raises:
            InvalidRecipeError: an adapter of the run is missing.
            InvalidInputError: the run's tasks are of one family, or no text tasks.
        """
        scores: dict[str, dict[str, Tensor]] = {task.name: {} for task in self.tasks}
        batch_size = self.pipeline.run.recipe.finetune.batch_size
        with self.pipeline.open_through_base(batch_size, seed=0) as through_base:
            for number, (task, label, path, make) in enumerate(self._list_scores(through_base)):
                if not path.exists():
                    self._write(path, task, make(), through_base.attachment)
                scores[task.name][label] = read_tensors(path)[0]["nll"]
                report(number + 1)
        return scores

    def _list_scores(
        self, through_base: ThroughBase
    ) -> Iterator[tuple[TextTask, str, Path, Callable[[], "_Subject"]]]:
        """Task, label, where it is kept, and what makes the subject."""
        references = self._find_folder({})
        for task in self.tasks:
            for label, make in self._list_references(task):
                yield task, label, references / f"{task.name}.{label}.safetensors", make
        families = list(dict.fromkeys(self.training_tasks.families))
        num_folds = min(self.settings.num_folds or len(families), len(families))
        for first in range(num_folds):
            rest = self.training_tasks.without(*families[first::num_folds])
            tasks = [task for task in self.tasks if task.name not in rest.names]
            for name, method in self.methods.items():
                folder = self._find_folder({**method.options, "num_folds": num_folds})
                for seed in self.settings.seeds:
                    fitted = _Fitted(method, rest, seed, self.encoder, through_base)
                    for task in tasks:
                        words = task.heldout_descriptions[0]
                        for label, told in (("", words), (".gibberish", GIBBERISH)):
                            label = f"{name}.{seed}{label}"
                            path = folder / f"{task.name}.{label}.safetensors"
                            yield task, label, path, partial(fitted.generate, told)

    def _list_references(self, task: TextTask) -> Iterator[tuple[str, Callable[[], "_Subject"]]]:
        """What needs no other task: the base, own adapters, prompts."""
        yield "base", _Subject
        for seed in self.pipeline.run.recipe.finetune.seeds:
            path = self.pipeline.run.adapter(task.name, seed)
            yield f"own.{seed}", partial(_read_own, path)
        words, shots = task.heldout_descriptions[0], task.train[:NUM_EXAMPLES]
        yield "description", lambda: _Subject(prefix=prompt_with_description(self.base, words))
        yield (
            "examples",
            lambda: _Subject(prefix=prompt_with_examples(self.base, shots, EXAMPLE_TOKENS)),
        )

    def _write(
        self, path: Path, task: TextTask, subject: "_Subject", attachment: Attachment
    ) -> None:
        windows = self._cut(task)
        nll = sum_window_nll(self.base, attachment, subject.vector, windows, subject.prefix)
        tensors = {"nll": nll}
        if subject.vector is not None:
            tensors["vector"] = subject.vector.to(VECTOR_DTYPE)
        write_tensors(path, tensors)

    @cached_property
    def tasks(self) -> tuple[TextTask, ...]:
        """Of the run.

        Raises:
            InvalidInputError: they are no text tasks.
        """
        tasks = tuple(task for task in self.pipeline.tasks if isinstance(task, TextTask))
        if len(tasks) != len(self.pipeline.tasks):
            raise InvalidInputError("unseen tasks are scored for text: give a run of text tasks")
        return tasks

    @cached_property
    def training_tasks(self) -> TrainingTasks:
        """All tasks, with all adapters."""
        return TrainingTasks.from_stages(
            self.pipeline.bases.layout,
            self.pipeline.read_checkpoints(),
            self.pipeline.encode_task_vectors(),
            {
                task.name: name
                for task, name in zip(self.tasks, self.pipeline.families, strict=True)
            },
        )

    @cached_property
    def encoder(self) -> TaskEncoder:
        """Of descriptions, the run's."""
        recipe = self.pipeline.run.recipe
        return build_task_encoder(encoder_spec(recipe.encoder, recipe.base))

    @property
    def base(self) -> BaseModel:
        """The run's."""
        return self.pipeline.base

    def _cut(self, task: TextTask) -> Int[Tensor, "windows window_tokens"]:
        if task.name not in self._windows:
            tokens = tokenize_documents(self.base, task.test)
            self._windows[task.name] = cut_windows(
                tokens,
                self.settings.num_windows,
                self.settings.window_tokens,
                self.settings.window_seed,
            )
        return self._windows[task.name]

    def _find_folder(self, options: Mapping[str, Any]) -> Path:
        """Scores of other windows, adapters or options lie in other folders."""
        settings = self.settings
        windows = [settings.num_windows, settings.window_tokens, settings.window_seed]
        sections = ("base", "tasks", "adapter", "finetune", "encoder")
        made_of = [self.pipeline.run.recipe.stage_digest(*sections), windows, options]
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return self.pipeline.run.root / "unseen" / digest[:16]


@dataclass(frozen=True)
class _Subject:
    """What is scored: the base, with an adapter or behind a prompt."""

    vector: Float[Tensor, " num_params"] | None = None
    prefix: Int[Tensor, " tokens"] | None = None


@dataclass
class _Fitted:
    """A method that is fitted when it is first needed."""

    method: Method
    tasks: TrainingTasks
    seed: int
    encoder: TaskEncoder
    through_base: ThroughBase

    @cached_property
    def _baseline(self) -> Baseline:
        baseline = self.method.build(self.through_base)
        baseline.fit(self.tasks, self.seed)
        return baseline

    def generate(self, words: str) -> _Subject:
        """The adapter of a description, rounded as it would be served."""
        vector = self._baseline.generate(self.encoder.encode([words])[0], self.seed)
        return _Subject(vector.to(VECTOR_DTYPE).float())


def _read_own(path: Path) -> _Subject:
    """Mean late checkpoint of one fine-tuning, rounded as it would be served."""
    kept = read_tensors(path)[0]["checkpoints"].float()
    return _Subject(kept.mean(0).to(VECTOR_DTYPE).float())
