"""What few-shot refinement is worth: held-out text of tasks of families that a bundle never saw.

    python -m tests.bench.refinement --out training/results/text-smollm2

The shipped text bundle generates an adapter from words, from words with eight examples, and from
these with gradient steps, as `POST /generate-lora` does. Writes refinement.json and refinement.md.
"""

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from service.inference.base_model import load_base_model
from service.inference.example_reader import ExampleReader, call_now
from service.inference.refiner import Refiner
from service.inference.text import TextEngine
from service.synthesis.adapter_recipe import AdapterRecipe
from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from service.synthesis.example_tasks import ExampleTexts
from service.synthesis.synthesizer import load_synthesizer
from service.threads import Computations
from training.adapters import cut_windows, tokenize_documents
from training.checkpoint import write_text
from training.evaluation.acceptance import list_unseen_families
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.text import sum_window_nll
from training.pipeline import describe_commit
from training.progress import show_progress
from training.shipped import BUNDLES_DIR, SUITES
from training.tasks.cache import default_cache_dir
from training.tasks.text import TextTask, load_text_tasks

NUM_EXAMPLES = 8
EXAMPLE_CHARACTERS = 600
"""Of each example: more than what a step reads of eight."""

METHODS = ("base", "words", "examples", "refined")


@dataclass(frozen=True)
class TaskRefinement:
    """A task of an unseen family.

    Attributes:
        task: its name.
        family: its family.
        nats: a token of held-out text, by method.
        loss_before: nats a token of the examples, unrefined.
        loss_after: the same, refined.
        seconds: that the steps took.
    """

    task: str
    family: str
    nats: dict[str, float]
    loss_before: float
    loss_after: float
    seconds: float


def measure_refinement(
    tasks: Sequence[TextTask], folder: Path, num_steps: int, num_windows: int, window_tokens: int
) -> list[TaskRefinement]:
    """Refines an adapter for each task, and scores it on the task's test documents."""
    synthesizer = load_synthesizer(folder)
    bundle = synthesizer.bundle
    serving, base = (
        load_base_model(bundle.base_reference, cache_dir=default_cache_dir(), bundle_folder=folder)
        for _ in range(2)
    )
    bundle.check_base(base.digest)
    engine = TextEngine(serving, bundle.layout, bundle.bases, num_slots=1)
    attachment = Attachment(base.model, bundle.bases)  # to score with, as training does
    reader = ExampleReader(engine, call_now)
    refiner = Refiner(engine, call_now, Computations(), timeout_seconds=3_600.0)
    results = []
    with show_progress("refine", len(tasks)) as report:
        for number, task in enumerate(tasks):
            texts = [text[:EXAMPLE_CHARACTERS] for text in task.train[:NUM_EXAMPLES]]
            examples, words = ExampleTexts.build(texts), task.heldout_descriptions[0]
            state = asyncio.run(reader.read(examples))
            recipe = AdapterRecipe.build_from_texts(
                examples, task=words, bundle_digest=bundle.digest, refine_steps=num_steps
            )
            shown = synthesizer.synthesize(recipe, state)
            started = time.perf_counter()
            steps = synthesizer.open_refinement(recipe, state)
            refined = asyncio.run(refiner.refine(steps, examples, num_steps))
            seconds = time.perf_counter() - started
            vectors = {
                "base": None,
                "words": synthesizer.synthesize_words(words).vector,
                "examples": shown.vector,
                "refined": synthesizer.take_refined(shown, refined).vector,
            }
            windows = cut_windows(
                tokenize_documents(base, task.test), num_windows, window_tokens, seed=0
            )
            nats = {}
            for name, vector in vectors.items():
                served = None if vector is None else vector.float()
                total = sum_window_nll(base, attachment, served, windows).sum()
                nats[name] = float(total) / (num_windows * (window_tokens - 1))
            results.append(
                TaskRefinement(
                    task.name,
                    task.family,
                    nats,
                    refined.loss_before,
                    refined.loss_after,
                    seconds,
                )
            )
            report(number + 1)
    return results


def render_table(results: Sequence[TaskRefinement]) -> str:
    """Markdown: perplexity on held-out text, means in nats a token."""
    lines = [
        "| task of an unseen family | base | from words | with eight examples | refined |",
        "|---|--:|--:|--:|--:|",
    ]
    for each in results:
        cells = [f"{math.exp(each.nats[method]):.2f}" for method in METHODS]
        lines.append(f"| {each.task} | {' | '.join(cells)} |")
    means = [statistics.mean(each.nats[method] for each in results) for method in METHODS]
    lines.append(f"| mean, nats a token | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the shipped text bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundle's results")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--window-tokens", type=int, default=65)
    given = parser.parse_args(arguments)
    folder = BUNDLES_DIR / SUITES["text"]
    bundle = read_bundle(folder)
    unseen = list_unseen_families([task.name for task in bundle.tasks])
    tasks = load_text_tasks("families", [*unseen])
    results = measure_refinement(tasks, folder, given.steps, given.windows, given.window_tokens)
    document = {
        "bundle": name_bundle(bundle),
        "commit": describe_commit(),
        "hardware": describe_hardware(),
        "settings": {
            "refine_steps": given.steps,
            "num_examples": NUM_EXAMPLES,
            "num_windows": given.windows,
            "window_tokens": given.window_tokens,
            "window_seed": 0,
        },
        "tasks": [asdict(each) for each in results],
    }
    write_text(given.out / "refinement.json", json.dumps(document, indent=1) + "\n")
    table = render_table(results)
    write_text(given.out / "refinement.md", table + "\n")
    print(table)


if __name__ == "__main__":
    main()
