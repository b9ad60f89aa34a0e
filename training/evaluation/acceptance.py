"""Which words a bundle takes for a task: accept rates of unseen wordings, and of gibberish.

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

from service.synthesis.novelty import THRESHOLD, draw_nonsense
from service.synthesis.synthesizer import Synthesizer, load_synthesizer
from training.checkpoint import write_text
from training.evaluation.report import describe_hardware

WORDINGS = {
    "text-smollm2": "text_domains.toml",
    "detection-embedded": "detection_wordings.toml",
}
"""The shipped bundles, and where their tasks' held-out wordings are."""

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
        count: texts.
        accepted: of them.
        median: in-distribution score.
        example: one text.
    """

    kind: str
    wanted: bool | None
    count: int
    accepted: int
    median: float
    example: str


def measure_acceptance(synthesizer: Synthesizer, name: str, seed: int = 0) -> list[Acceptance]:
    """Accept rates of a shipped bundle."""
    draw = random.Random(seed)
    own = read_wordings(WORDINGS[name])
    other = [text for key in WORDINGS if key != name for text in read_wordings(WORDINGS[key])]
    words = sorted({word for text in own for word in text.split()})
    nonsense = draw_nonsense(2 * COUNT, seed=seed)  # of another seed than the calibration's
    kinds: list[tuple[str, bool | None, list[str]]] = [
        ("held-out wordings of the training tasks", True, own),
        ("wordings of the other bundle's tasks", None, other),
        ("random letters", False, nonsense[::2]),
        ("digits and signs", False, nonsense[1::2]),
        ("keys pressed at random, greetings, fragments", False, list(FRAGMENTS)),
        ("the tasks' words in random order", None, [_shuffle(draw, words) for _ in range(COUNT)]),
    ]
    return [_measure(synthesizer, *kind) for kind in kinds]


def read_wordings(file: str) -> list[str]:
    """Held-out wordings of all tasks of a file in training/tasks."""
    document = tomllib.loads((_TASKS / file).read_text(encoding="utf-8"))
    return [text for task in document.values() for text in task["heldout_descriptions"]]


def render_table(synthesizer: Synthesizer, results: Sequence[Acceptance]) -> str:
    """Markdown."""
    bundle = synthesizer.bundle
    lines = [
        f"Accepted as a task, bundle `{bundle.name}` {bundle.version} (`{bundle.digest[:12]}`): "
        f"an in-distribution score of at least {THRESHOLD:g}, which 95% of the training tasks' "
        "own wordings reach when their task is left out.",
        "",
        "| words | texts | accepted | median score | example |",
        "|---|--:|--:|--:|---|",
    ]
    lines.extend(
        f"| {each.kind} | {each.count} | {each.accepted / each.count:.1%} "
        f"| {each.median:.3f} | `{each.example}` |"
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
            "bundle": {"name": bundle.name, "version": bundle.version, "digest": bundle.digest},
            "hardware": describe_hardware(),
            "threshold": THRESHOLD,
            "kinds": [each.__dict__ for each in results],
        }
        write_text(out / name / "acceptance.json", json.dumps(document, indent=1) + "\n")
        table = render_table(synthesizer, results)
        write_text(out / name / "acceptance.md", table)
        print(table)


def _measure(
    synthesizer: Synthesizer, kind: str, wanted: bool | None, texts: Sequence[str]
) -> Acceptance:
    scores = [synthesizer.score(text) for text in texts]
    accepted = sum(score >= THRESHOLD for score in scores)
    median = sorted(scores)[len(scores) // 2]
    return Acceptance(kind, wanted, len(texts), accepted, median, texts[0])


def _shuffle(draw: random.Random, words: Sequence[str]) -> str:
    return " ".join(draw.choices(words, k=draw.randint(3, 10)))


if __name__ == "__main__":
    main()
