"""Committed results of unseen tasks: their part of RESULTS.md, and their targets."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from training.evaluation.unseen_shares import MethodShare, render_interval, render_shares
from training.reproduction.tables import describe_machine
from training.reproduction.variants import OURS

UNSEEN_DIRS: Mapping[str, str] = {"text": "text-families", "detection": "detection-wide"}
"""Folder of each suite's `unseen.json` in the results."""

MIN_TEXT_SHARE = 0.55
"""Of the headroom, by words alone."""

MIN_EXAMPLES_SHARE = 0.75
"""Of the headroom, by words and eight examples."""

MIN_STEERED = 0.8
"""Of the tasks: the true words do better than any wrong ones."""

BY_EXAMPLES = "examples"
"""Name of the prompt, and suffix of methods, that are shown examples."""

SIMPLE = ("soup", "nearest", "pca_ridge")
"""What must be beaten on unseen detection tasks; on text everything that uses no examples."""

_ABOUT: Mapping[str, str] = {
    "text": "Every task is scored by methods that never saw its family: neither its adapters and "
    "texts nor its descriptions. A share of 0 is the base, 1 the task's own adapter, in NLL of "
    "held-out windows; `description` and `examples` are prompts for the base, eight examples of "
    "together 512 tokens; `+description` is an adapter and the prompt together, all from the "
    "same words, and `+examples` an adapter from words behind the examples. Steps and prompt of "
    "training through the base were chosen on the first of the folds.",
    "detection": "Every category is scored by methods that never saw its adapters or "
    "descriptions. A share of 0 is the base, asked in words that it was trained on, 1 the "
    "category's own adapter, in AP50 on composited test scenes; `description` is the base asked in "
    "the unseen words that adapters are made from and asked in. Learning rate and steps of "
    "training through the base were chosen on six of the categories.",
}

WHY_NOT_FURTHER: Mapping[str, str] = {
    "text": "Why not further: beyond the mean of the other families, words and even examples say "
    "next to nothing of the weights that a fine-tuning of an unseen family ends at, so little is "
    "left to predict; trained through the base, most of what helps is common to all tasks, which "
    "one adapter for all of them learns as well. Tried: steps and prompts of that training, "
    "scaling the mean adapter up, a temperature chosen on hidden families.",
    "detection": "Why not further: an adapter makes the base box what its category looks like, and "
    "some dozens of categories do not teach what the word for another one looks like: the text "
    "encoder never saw a picture. Any adapter makes the base worse at what it was not trained for, "
    "so every method ends below the base in AP50. Tried: learning rates and steps of training "
    "through the base, a start from the base instead of the soup, a strength chosen on hidden "
    "categories, contrast, and (not kept) a hypernetwork from the direction that a description "
    "has among image tokens through ImageNet's classes: it points into an object more often than "
    "chance, but what was learned from it found no boxes of unseen categories. With the first 24 "
    "categories alone the same method was ahead of soup, nearest and ridge in AP50; with all of "
    "them it is not.",
}
"""What was tried where targets are missed, and what stands in the way."""

_ABLATIONS: Mapping[str, str] = {
    "in_context": "training through the base",
    "token_functional": "looking at other tasks' adapters",
    "multi_task": "words for the adapter: one for all tasks",
    "top_k": "the generator: adapters of the nearest tasks, weighted",
}
"""What a method lacks of `in_context_functional`, both behind the same prompt or behind none."""

_CONTRAST: Mapping[str, str] = {
    "in_context_contrastive": "contrast",
    "in_context_functional": "nothing; contrast is added",
}
"""By the judged method: how the other of these two differs from it."""

_READING = (
    "Intervals of the mean draw whole families. `better by` is by how much the judged method's "
    "mean over all tasks is better than the row's, also where there is no headroom. "
    "`ahead of it by` is the judged method's mean share less that of the row's; wins, ties and "
    "losses are its tasks against the row's, by paired intervals. `from gibberish` is the same "
    "method told random letters."
)


@dataclass(frozen=True)
class UnseenResults:
    """A committed `unseen.json`; the first of its methods is the judged one."""

    document: Mapping[str, Any]
    results: tuple[MethodShare, ...]

    @property
    def judged(self) -> MethodShare:
        """Ours."""
        return next(each for each in self.results if each.behind is None)


def read_unseen(suite: str, results: Path) -> UnseenResults | None:
    """A suite's results; None where none are committed."""
    path = results / UNSEEN_DIRS[suite] / "unseen.json"
    if not path.exists():
        return None
    document = json.loads(path.read_text(encoding="utf-8"))
    read = TypeAdapter(tuple[MethodShare, ...]).validate_python
    return UnseenResults(document, read(document["results"]))


def render_unseen(suite: str, found: UnseenResults) -> Iterator[str]:
    """Paragraphs about a suite's unseen tasks, without losses and figure."""
    document, settings = found.document, found.document["settings"]
    families = document["families"]
    kept = {name: value for name, value in settings.items() if name != "seeds"}
    yield _ABOUT[suite]
    yield (
        f"Recipe `{document['recipe']['bundle']['name']}` (`{document['recipe_digest'][:12]}`), "
        f"{len(families)} tasks in {len(set(families.values()))} families, fine-tuning seeds "
        f"{', '.join(map(str, document['recipe']['finetune']['seeds']))}, seeds of the methods "
        f"{', '.join(map(str, settings['seeds']))}; "
        + ", ".join(f"`{name}` {value}" for name, value in kept.items() if value is not None)
        + f"; commit `{document['commit']}`; {describe_machine(document['hardware'])}."
    )
    yield render_shares(found.results, document["unit"])
    yield (
        f"{document['unit']}: mean over all tasks, of the base {document['base']:.3f}, of own "
        f"adapters {document['own']:.3f}. {_READING}"
    )
    if ablations := list(_list_ablations(found)):
        yield "What each ingredient is worth:"
        yield "\n".join(
            ["| without | is | share of headroom | less by |", "|---|---|--:|--:|", *ablations]
        )


def _list_ablations(found: UnseenResults) -> Iterator[str]:
    """Rows of a table: the judged method with one ingredient removed."""
    method, plus, prompt = found.judged.name.partition("+")
    if method not in _CONTRAST:
        return
    (other,) = {*_CONTRAST} - {method}
    lacking = {other: _CONTRAST[method], **_ABLATIONS}
    removed = {f"{name}{plus}{prompt}": lacks for name, lacks in lacking.items()}
    if plus:
        removed[method] = f"the {prompt} before the text"
        removed[prompt] = "an adapter"
    for each in found.results:
        if each.name in removed and each.behind is not None:
            yield (
                f"| {removed[each.name]} | `{each.name}` | {each.share.mean.value:.3f} | "
                f"{render_interval(each.behind)} |"
            )


def list_unseen_losses(results: Sequence[MethodShare]) -> Iterator[str]:
    """Where the judged method is behind, or where its words do not matter."""
    judged = next(each for each in results if each.behind is None)
    rivals = {each.name: each.behind for each in results if each.behind is not None}
    for each in results:
        if each.name in rivals and rivals[each.name].high < 0:
            yield (
                f"`{each.name}` is clearly ahead: {each.share.mean.value:.3f} against "
                f"{judged.share.mean.value:.3f} of `{judged.name}`."
            )
    ties = [f"`{name}`" for name, behind in rivals.items() if behind.low <= 0 <= behind.high]
    if ties:
        yield f"`{judged.name}` has no clear lead over {', '.join(ties)}."
    if judged.gibberish is not None and judged.gibberish.mean.value >= judged.share.mean.value:
        yield f"`{judged.name}` does as well with gibberish as with the description."
    if judged.share.mean.value < 0:
        yield f"`{judged.name}` is worse than the base alone on the mean."
    worse = [task for task, share in judged.tasks.items() if share is not None and share < 0]
    if worse:
        yield f"`{judged.name}` is worse than the base alone on: {', '.join(worse)}."
    if judged.share.undefined:
        yield (f"Without headroom, and so not in the means: {', '.join(judged.share.undefined)}.")


def list_unseen_targets(suite: str, found: UnseenResults) -> Iterator[tuple[str, str, str, bool]]:
    """Name, what was measured, target, and whether it is met."""
    judged = found.judged
    mean = judged.share.mean
    if suite == "text":
        yield (
            "unseen text: share of headroom by words",
            f"{mean.value:.3f}",
            f"at least {MIN_TEXT_SHARE:g}",
            mean.value >= MIN_TEXT_SHARE,
        )
        shown = max(
            (each for each in found.results if each.name.endswith(f"+{BY_EXAMPLES}")),
            key=lambda each: each.share.mean.value,
            default=None,
        )
        if shown is not None:
            yield (
                "unseen text: share of headroom with eight examples",
                f"{shown.share.mean.value:.3f} (`{shown.name}`)",
                f"at least {MIN_EXAMPLES_SHARE:g}",
                shown.share.mean.value >= MIN_EXAMPLES_SHARE,
            )
    rivals = [
        each
        for each in found.results
        if each.behind is not None
        and not each.name.startswith(OURS)
        and (each.name in SIMPLE if suite == "detection" else not each.name.endswith(BY_EXAMPLES))
    ]
    target = "of all that use no examples" if suite == "text" else f"of {', '.join(SIMPLE)}"
    leads = {
        "share of headroom": [each.behind for each in rivals],
        found.document["unit"]: [each.better_by for each in rivals],
    }
    for measure, lead in leads.items():
        beaten = sum(each is not None and each.low > 0 for each in lead)
        yield (
            f"unseen {suite}: significantly ahead, {measure}",
            f"of {beaten} of {len(rivals)} methods",
            target,
            beaten == len(rivals),
        )
    if judged.margins is not None:
        steered = sum(margin > 0 for margin in judged.margins.values())
        yield (
            f"unseen {suite}: steering margin above 0",
            f"on {steered} of {len(judged.margins)} tasks",
            f"at least {MIN_STEERED:.0%}",
            steered >= MIN_STEERED * len(judged.margins),
        )
    if judged.gibberish is not None:
        gibberish = judged.gibberish.mean.value
        yield (
            f"unseen {suite}: gibberish below the truth on the mean",
            f"{gibberish:.3f}",
            f"below {mean.value:.3f}",
            gibberish < mean.value,
        )
