"""Which words a bundle takes for a task: accept rates and AUROC of unseen wordings and gibberish.

    python -m training.evaluation.acceptance --out training/results

The threshold comes from the bundle's training wordings alone (`service.synthesis.novelty`); here
it meets words that had no part in it. Writes acceptance.json and acceptance.md per bundle.
"""

import argparse
import json
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from service.synthesis.novelty import THRESHOLD, draw_nonsense
from service.synthesis.synthesizer import Synthesizer, load_synthesizer
from training.checkpoint import write_text
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.statistics import measure_auroc

WORDINGS = {
    "text-smollm2": "text_domains.toml",
    "detection-embedded": "detection_wordings.toml",
}
"""The shipped bundles, and where their tasks' held-out wordings are."""

MIN_AUROC = 0.95
"""Target of gibberish, and of tasks of another modality."""

MIN_FAMILY_AUROC = 0.8
"""Target of tasks of unseen families, which are tasks all the same."""

COUNT = 100
"""Texts of each kind of gibberish."""

FRAGMENTS = (
    "asdf qwer zxcv",
    "asdfghjkl",
    "hjklhjklhjkl",
    "aaaaaaaaaaaaaa",
    "zzzz",
    "hello",
    "the",
    "ok thanks bye",
    "flibber gzorp wug",
    "twas brillig and the slithy toves",
    "lorem ipsum dolor sit amet",
    "colorless green ideas sleep furiously",
    "purple elephants negotiate taxes",
    "banana banana banana",
    "test test 123",
    "foo bar baz qux",
)
"""Written by hand, unlike what the calibration draws."""

_TASKS = Path(__file__).parent.parent / "tasks"
_BUNDLES = Path(__file__).parent.parent.parent / "service" / "bundles"


@dataclass(frozen=True)
class Acceptance:
    """How a kind of words fares.

    Attributes:
        kind: of words.
        wanted: whether they should be accepted; None: neither.
        min_auroc: target of `auroc`; None: none.
        count: texts.
        accepted: of them.
        median: in-distribution score.
        auroc: probability that one of the training tasks' held-out wordings scores above one of
            these; None for themselves.
        example: one text.
    """

    kind: str
    wanted: bool | None
    min_auroc: float | None
    count: int
    accepted: int
    median: float
    auroc: float | None
    example: str


def measure_acceptance(synthesizer: Synthesizer, name: str, seed: int = 0) -> list[Acceptance]:
    """Accept rates of a shipped bundle."""
    draw = random.Random(seed)
    own = read_wordings(WORDINGS[name])
    other = [text for key in WORDINGS if key != name for text in read_wordings(WORDINGS[key])]
    words = sorted({word for text in own for word in text.split()})
    nonsense = draw_nonsense(2 * COUNT, seed=seed)  # of another seed than the calibration's
    shuffled = [_shuffle(draw, words) for _ in range(COUNT)]
    kinds: list[tuple[str, bool | None, float | None, list[str]]] = [
        ("held-out wordings of the training tasks", True, None, own),
        ("wordings of the other bundle's tasks", None, MIN_AUROC, other),
        ("random letters", False, MIN_AUROC, nonsense[::2]),
        ("digits and signs", False, MIN_AUROC, nonsense[1::2]),
        ("keys pressed at random, greetings, fragments", False, MIN_AUROC, list(FRAGMENTS)),
        ("the tasks' words in random order", None, None, shuffled),
    ]
    if synthesizer.bundle.modality == "text":
        left = list_unseen_families([task.name for task in synthesizer.bundle.tasks])
        families = [text for table in left.values() for text in table["heldout_descriptions"]]
        kinds.insert(2, ("wordings of tasks of unseen families", None, MIN_FAMILY_AUROC, families))
    scores = [[synthesizer.score(text) for text in texts] for *_, texts in kinds]
    return [
        _judge(kind, wanted, min_auroc, texts[0], scored, known=scores[0])
        for (kind, wanted, min_auroc, texts), scored in zip(kinds, scores, strict=True)
    ]


def read_wordings(file: str) -> list[str]:
    """Held-out wordings of all tasks of a file in training/tasks."""
    document = tomllib.loads((_TASKS / file).read_text(encoding="utf-8"))
    return [text for task in document.values() for text in task["heldout_descriptions"]]


def list_unseen_families(seen: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Tables in `text_families.toml`, by task, of families that no seen task belongs to.

    Args:
        seen: names of tasks, or of what a family was made from.
    """
    tables = tomllib.loads((_TASKS / "text_families.toml").read_text(encoding="utf-8"))
    domains = tomllib.loads((_TASKS / WORDINGS["text-smollm2"]).read_text(encoding="utf-8"))
    known = {*seen, *domains}
    families = {t["family"] for name, t in tables.items() if {name, t["family"]} & known}
    return {name: table for name, table in tables.items() if table["family"] not in families}


def render_table(synthesizer: Synthesizer, results: Sequence[Acceptance]) -> str:
    """Markdown."""
    bundle = synthesizer.bundle
    lines = [
        f"Accepted as a task, bundle `{bundle.name}` {bundle.version} (`{bundle.digest[:12]}`): "
        f"an in-distribution score of at least {THRESHOLD:g}, which 95% of the training tasks' "
        "own wordings reach when their task is left out.",
        "",
        "| words | texts | accepted | median score | AUROC | example |",
        "|---|--:|--:|--:|--:|---|",
    ]
    lines.extend(
        f"| {each.kind} | {each.count} | {each.accepted / each.count:.1%} "
        f"| {each.median:.3f} | {'' if each.auroc is None else f'{each.auroc:.3f}'} "
        f"| `{each.example}` |"
        for each in results
    )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures both shipped bundles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles' results")
    out: Path = parser.parse_args(arguments).out
    for name in WORDINGS:
        synthesizer = load_synthesizer(_BUNDLES / name)
        results = measure_acceptance(synthesizer, name)
        bundle = synthesizer.bundle
        document = {
            "bundle": name_bundle(bundle),
            "hardware": describe_hardware(),
            "threshold": THRESHOLD,
            "kinds": [each.__dict__ for each in results],
        }
        write_text(out / name / "acceptance.json", json.dumps(document, indent=1) + "\n")
        table = render_table(synthesizer, results)
        write_text(out / name / "acceptance.md", table)
        print(table)


def _judge(
    kind: str,
    wanted: bool | None,
    min_auroc: float | None,
    example: str,
    scores: Sequence[float],
    known: Sequence[float],
) -> Acceptance:
    accepted = sum(score >= THRESHOLD for score in scores)
    median = sorted(scores)[len(scores) // 2]
    auroc = None if wanted else measure_auroc(torch.tensor(known), torch.tensor(scores))
    return Acceptance(kind, wanted, min_auroc, len(scores), accepted, median, auroc, example)


def _shuffle(draw: random.Random, words: Sequence[str]) -> str:
    return " ".join(draw.choices(words, k=draw.randint(3, 10)))


if __name__ == "__main__":
    main()
