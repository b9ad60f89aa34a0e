"""Text suite: held-out perplexity of base, own adapter, soup and generated adapter.

The generated adapter comes from words alone, a wording that training never saw, with z = 0.
Generation reads the bundle, which holds no task's own adapter; the own adapters, which only
this comparison needs, lie outside of it.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from service.errors import InvalidAdapterError
from service.inference.base_model import BaseModel
from service.synthesis.attachment import Attachment
from service.synthesis.synthesizer import Synthesizer
from training.adapters import cut_windows, measure_nll, read_prefix, tokenize_documents
from training.evaluation.statistics import Interval, bootstrap_ppl_ratio
from training.progress import Report
from training.tasks.text import TextTask

GIBBERISH = "xqv blorft zanti uumph krel dvorsk pliggle"
"""Control: an adapter generated from this must not do as well as one from the description."""

METHODS = ("base", "own", "soup", "generated", "gibberish")
BATCH_WINDOWS = 16

MAX_PPL_RATIO = 1.01
"""A generated adapter is as good as the task's own up to this ratio of perplexities."""


@dataclass(frozen=True)
class Score:
    """Held-out loss of one method on one task, all from one NLL sum.

    Attributes:
        nats_per_token: NLL / predicted tokens.
        ppl: exp(nats_per_token).
        bpc: bits per character, NLL / (ln 2 * characters of the predicted tokens).
    """

    nats_per_token: float
    ppl: float
    bpc: float


@dataclass(frozen=True)
class TaskResult:
    """All methods on one task.

    Attributes:
        name: task.
        title: task, for tables.
        description: held-out wording that the adapter was generated from.
        windows: evaluation windows.
        tokens: predicted tokens in all windows.
        characters: characters of those tokens.
        scores: by method.
        ppl_ratio: generated over own, with its paired bootstrap interval.
        gain_share: share of the own adapter's gain over the base (nats) that is recovered.
        weight_error: relative L2 distance to the own adapter's vector.
        nearest: nearest training task of each held-out wording.
    """

    name: str
    title: str
    description: str
    windows: int
    tokens: int
    characters: int
    scores: Mapping[str, Score]
    ppl_ratio: Interval
    gain_share: Mapping[str, float]
    weight_error: Mapping[str, float]
    nearest: Sequence[str]


def evaluate_text(
    synthesizer: Synthesizer,
    own_adapters: Mapping[str, Float[Tensor, " num_params"]],
    base: BaseModel,
    tasks: Sequence[TextTask],
    *,
    num_windows: int,
    window_tokens: int,
    seed: int,
    report: Report,
) -> list[TaskResult]:
    """Scores every method on every task's held-out documents.

    Raises:
        InvalidAdapterError: a task has no own adapter to compare with.
        BaseModelMismatchError: the base is not the bundle's.
        InvalidTaskDataError: a task holds too few held-out windows.
    """
    bundle = synthesizer.bundle
    bundle.check_base(base.digest)
    attachment = Attachment(base.model, bundle.bases)
    results: list[TaskResult] = []
    for task in tasks:
        if task.name not in own_adapters:
            raise InvalidAdapterError(f"no own adapter of task {task.name!r} to compare with")
        tokens = tokenize_documents(base, task.test)
        windows = cut_windows(tokens, num_windows, window_tokens, seed)
        own = own_adapters[task.name].float()
        words = [synthesizer.synthesize_words(words) for words in task.heldout_descriptions]
        vectors = {
            "base": None,
            "own": own,
            "soup": bundle.normalizer.mean,
            "generated": words[0].vector.float(),
            "gibberish": synthesizer.synthesize_words(GIBBERISH).vector.float(),
        }
        sums: dict[str, Tensor] = {}
        for method in METHODS:
            sums[method] = sum_window_nll(base, attachment, vectors[method], windows)
            report(len(results) * len(METHODS) + len(sums))
        characters = sum(len(text) for text in base.tokenizer.batch_decode(windows[:, 1:].tolist()))
        results.append(
            _summarize(
                task, sums, vectors, windows, characters, [each.nearest[0].name for each in words]
            )
        )
    attachment.detach(base.model)
    return results


def sum_window_nll(
    base: BaseModel,
    attachment: Attachment,
    vector: Float[Tensor, " num_params"] | None,
    windows: Int[Tensor, "windows window_tokens"],
    prefix: Int[Tensor, " prefix_tokens"] | None = None,
) -> Float[Tensor, " windows"]:
    """Summed NLL in nats of each window under one adapter, or under the base for None.

    A prefix stands before every window and is not scored.
    """
    rows = None if vector is None else vector[None].to(base.device, base.dtype)
    attachment.rows.vectors = rows
    with torch.inference_mode():
        read = None if prefix is None else read_prefix(base, prefix)
        parts = []
        for batch in torch.split(windows, BATCH_WINDOWS):
            own = copy.deepcopy(read)  # it grows by the windows
            if own is not None:
                own.batch_repeat_interleave(len(batch))
            parts.append(measure_nll(base, batch, own).sum(1).cpu())
    attachment.rows.vectors = None
    return torch.cat(parts).double()


def _summarize(
    task: TextTask,
    sums: Mapping[str, Tensor],
    vectors: Mapping[str, Tensor | None],
    windows: Tensor,
    characters: int,
    nearest: Sequence[str],
) -> TaskResult:
    predicted = windows.shape[1] - 1
    tokens = len(windows) * predicted
    scores = {}
    for method, nll in sums.items():
        nats = float(nll.sum()) / tokens
        bits = float(nll.sum()) / (math.log(2) * characters)
        scores[method] = Score(nats, math.exp(nats), bits)
    gain = scores["base"].nats_per_token - scores["own"].nats_per_token
    own = vectors["own"]
    assert own is not None
    return TaskResult(
        name=task.name,
        title=task.title,
        description=task.heldout_descriptions[0],
        windows=len(windows),
        tokens=tokens,
        characters=characters,
        scores=scores,
        ppl_ratio=bootstrap_ppl_ratio(sums["generated"], sums["own"], predicted),
        gain_share={
            method: (scores["base"].nats_per_token - scores[method].nats_per_token) / gain
            for method in ("soup", "generated", "gibberish")
        },
        weight_error={
            method: float((vector - own).norm() / own.norm())
            for method, vector in vectors.items()
            if vector is not None and method != "own"
        },
        nearest=tuple(nearest),
    )


def to_json(results: Sequence[TaskResult]) -> list[dict[str, object]]:
    """Results as plain dictionaries."""
    return [asdict(result) for result in results]
