"""What is scored of an unseen task: held-out text under an adapter, or what it finds in scenes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment
from training.adapters import cut_windows, tokenize_documents
from training.baselines.prompt import prompt_with_description, prompt_with_examples
from training.detection_examples import encode_scenes
from training.evaluation.average_precision import Matches, resample_ap, score_category
from training.evaluation.boxes import find_boxes
from training.evaluation.headroom import HeadroomShare, measure_share, measure_text_share
from training.evaluation.statistics import Interval, Resampled, resample_ratio
from training.evaluation.text import sum_window_nll
from training.task_vectors import AnyTask
from training.tasks.detection_task import DetectionData, DetectionTask
from training.tasks.text import TextTask

NUM_EXAMPLES = 8
"""Of the few-shot prompt; they are training texts of the task."""

EXAMPLE_TOKENS = 512
"""Of all examples together."""

Score = Tensor
"""What is kept of a task under one subject; only its suite knows what it means."""


@runtime_checkable
class UnseenSuite(Protocol):
    """How tasks of one kind are scored."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """What stands before the data without an adapter, to be compared with adapters."""
        ...

    @property
    def unit(self) -> str:
        """Of what `read` gives."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """All that a score depends on besides task and adapter, as JSON."""
        ...

    def score(
        self,
        attachment: Attachment,
        task: AnyTask,
        vector: Float[Tensor, " num_params"] | None,
        prompt: str | None = None,
        words: str | None = None,
    ) -> Score:
        """Scores a task with an adapter or the base alone, without or behind a prompt.

        Args:
            attachment: to the base, of the adapter.
            task: what is scored.
            vector: adapter; None for the base alone.
            prompt: one of `prompts`.
            words: of the prompt `description`, the task's held-out ones where None.
        """
        ...

    def read(self, scores: Sequence[Score]) -> float:
        """A task's score in `unit`; several fine-tunings or seeds are averaged."""
        ...

    def resample(self, score: Score) -> Resampled:
        """A task's score on draws of its data; higher is better."""
        ...

    def measure_share(
        self, base: Score, own: Sequence[Score], judged: Sequence[Score]
    ) -> HeadroomShare:
        """Share of the headroom; several fine-tunings or seeds are averaged."""
        ...

    def compare(self, ours: Sequence[Score], theirs: Sequence[Score]) -> Interval:
        """How much better ours are, with a paired interval."""
        ...


@dataclass
class TextSuite:
    """NLL in nats of held-out windows of every task; all tokens but the first are scored."""

    base: BaseModel
    num_windows: int
    window_tokens: int
    window_seed: int = 0
    prompts: tuple[str, ...] = ("description", "examples")
    unit: str = "nats a token"
    _windows: dict[str, Int[Tensor, "windows window_tokens"]] = field(default_factory=dict)

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which windows."""
        return {
            "num_windows": self.num_windows,
            "window_tokens": self.window_tokens,
            "window_seed": self.window_seed,
        }

    def score(
        self,
        attachment: Attachment,
        task: AnyTask,
        vector: Float[Tensor, " num_params"] | None,
        prompt: str | None = None,
        words: str | None = None,
    ) -> Float[Tensor, " windows"]:
        """NLL of every window."""
        assert isinstance(task, TextTask)
        prefix = None
        if prompt == "description":
            prefix = prompt_with_description(self.base, words or task.heldout_descriptions[0])
        elif prompt == "examples":
            shots = task.train[:NUM_EXAMPLES]
            prefix = prompt_with_examples(self.base, shots, EXAMPLE_TOKENS)
        return sum_window_nll(self.base, attachment, vector, self.cut(task), prefix)

    def read(self, scores: Sequence[Score]) -> float:
        """NLL per token."""
        return float(_average(scores).sum() / self._tokens.sum())

    def resample(self, score: Score) -> Resampled:
        """Negative NLL per token."""
        return resample_ratio(-score, self._tokens, seed=0)

    def measure_share(
        self, base: Score, own: Sequence[Score], judged: Sequence[Score]
    ) -> HeadroomShare:
        """Share in NLL per token."""
        return measure_text_share(base, _average(own), _average(judged), self._tokens)

    def compare(self, ours: Sequence[Score], theirs: Sequence[Score]) -> Interval:
        """By how many nats per token ours lose less."""
        less = _average(theirs) - _average(ours)
        return resample_ratio(less, self._tokens, seed=0).interval()

    @property
    def _tokens(self) -> Float[Tensor, " windows"]:
        return torch.full((self.num_windows,), self.window_tokens - 1.0).double()

    def cut(self, task: TextTask) -> Int[Tensor, "windows window_tokens"]:
        """Windows of a task's test documents."""
        if task.name not in self._windows:
            tokens = tokenize_documents(self.base, task.test)
            self._windows[task.name] = cut_windows(
                tokens, self.num_windows, self.window_tokens, self.window_seed
            )
        return self._windows[task.name]


@dataclass
class DetectionSuite:
    """AP50 on the test scenes, with its draws of instances.

    The base alone is asked in words that it was trained on, its best case, and as `description` in
    the held-out words; with an adapter it is asked in these, which the adapter is made from.
    """

    base: BaseModel
    data: DetectionData
    prompts: tuple[str, ...] = ("description",)
    unit: str = "AP50"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Which scenes."""
        return {"num_scenes": len(self.data.test.objects)}

    @cached_property
    def _features(self) -> Float[Tensor, "scenes features rows columns"]:
        return encode_scenes(self.base, self.data.test, range(len(self.data.test.objects)))

    def score(
        self,
        attachment: Attachment,
        task: AnyTask,
        vector: Float[Tensor, " num_params"] | None,
        prompt: str | None = None,
        words: str | None = None,
    ) -> Float[Tensor, " values"]:
        """AP50, and after it AP50 of each draw of instances."""
        assert isinstance(task, DetectionTask), "text tasks have no scenes"
        plain = vector is None and prompt is None
        asked = (task.descriptions if plain else task.heldout_descriptions)[0]
        found = find_boxes(self.base, attachment, vector, self._features, asked)
        return keep_draws(score_category(found, self.data.test.objects, task.name).matches50)

    def read(self, scores: Sequence[Score]) -> float:
        """AP50."""
        return float(_average(scores)[0])

    def resample(self, score: Score) -> Resampled:
        """AP50 of the draws of instances."""
        return _read_draws(score)

    def measure_share(
        self, base: Score, own: Sequence[Score], judged: Sequence[Score]
    ) -> HeadroomShare:
        """Share in AP50; the test of headroom is the bootstrap (AP is no sum of instances)."""
        scores = [_read_draws(score) for score in (base, _average(own), _average(judged))]
        return measure_share(*scores, p_value=(scores[1] - scores[0]).p_value())

    def compare(self, ours: Sequence[Score], theirs: Sequence[Score]) -> Interval:
        """By how much AP50 of ours is higher."""
        return (_read_draws(_average(ours)) - _read_draws(_average(theirs))).interval()


def keep_draws(matches: Matches) -> Float[Tensor, " values"]:
    """AP50, and after it AP50 of each draw of instances."""
    resampled = resample_ap(matches)
    return torch.from_numpy(np.append(resampled.value, resampled.draws))


def _average(scores: Sequence[Score]) -> Score:
    return torch.stack(list(scores)).mean(0)


def _read_draws(score: Score) -> Resampled:
    return Resampled(float(score[0]), score[1:].numpy())
