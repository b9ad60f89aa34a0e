"""The text evaluation over fine-tuning seeds: own adapters of further ones, and COND P-DIFF of one.

    python -m training.evaluation.finetune_seeds --run runs/text-seeds --out training/results

How far apart are two fine-tunings of one task? A generated adapter is no better or worse than its
task's own one by less. Fine-tunes the shipped text bundle's tasks anew under seeds 1 and 2 (about
40 minutes of one core a seed), fits COND P-DIFF to the checkpoints of the first, and scores them
all on the windows of the committed evaluation. It resumes, and several processes may share a run
while they fine-tune. Detection has all of this in Table 4 (`icm-lora reproduce`).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from service.synthesis.synthesizer import VECTOR_DTYPE
from service.synthesis.task_encoder import build_task_encoder
from training.baselines import TrainingTasks, build_baseline
from training.checkpoint import write_text
from training.evaluation.outcomes import FURTHER_SEEDS
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.unseen_suites import TextSuite
from training.pipeline import Pipeline, describe_commit
from training.progress import show_progress
from training.recipe import Recipe
from training.run_dir import RunDir
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES
from training.task_vectors import encoder_spec

RESULT_NAME = "finetune_seeds.json"

Adapters = dict[str, Float[Tensor, " num_params"]]
"""By task."""


def read_own(pipeline: Pipeline, seed: int) -> Adapters:
    """Mean late checkpoint of every task under one fine-tuning seed.

    Raises:
        InvalidRecipeError: an adapter is missing: another process still fine-tunes it.
    """
    return {name: kept.mean(0) for name, kept in _read_checkpoints(pipeline, seed).items()}


def generate_by_cond_p_diff(pipeline: Pipeline, seed: int) -> Adapters:
    """What COND P-DIFF, fitted to one fine-tuning seed, makes of every task's unseen wording."""
    checkpoints = _read_checkpoints(pipeline, seed)
    families = dict(zip(checkpoints, pipeline.families, strict=True))
    vectors = pipeline.encode_task_vectors()
    tasks = TrainingTasks.from_stages(pipeline.bases.layout, checkpoints, vectors, families)
    baseline = build_baseline("cond_p_diff")
    baseline.fit(tasks, seed=0)
    recipe = pipeline.run.recipe
    encoder = build_task_encoder(encoder_spec(recipe.encoder, recipe.base))
    unseen = encoder.encode([task.heldout_descriptions[0] for task in pipeline.tasks])
    made = {
        name: baseline.generate(vector, seed=0)
        for name, vector in zip(checkpoints, unseen, strict=True)
    }
    return {name: vector.to(VECTOR_DTYPE).float() for name, vector in made.items()}


def score_adapters(
    pipeline: Pipeline, adapters: Mapping[str, Adapters], settings: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Nats a token, by label and task.

    Args:
        pipeline: of the tasks and the base.
        adapters: by label.
        settings: of the evaluation: which windows.

    Raises:
        InvalidTaskDataError: a task holds too few held-out windows.
    """
    base = pipeline.base
    window_tokens, window_seed = settings["window_tokens"], settings["seed"]
    suite = TextSuite(base, settings["num_windows"], window_tokens, window_seed)
    attachment = Attachment(base.model, pipeline.bases)
    scores: dict[str, dict[str, float]] = {label: {} for label in adapters}
    with show_progress("score seeds", len(adapters) * len(pipeline.tasks)) as report:
        for task in pipeline.tasks:
            for label, vectors in adapters.items():
                nll = suite.score(attachment, task, vectors[task.name])
                scores[label][task.name] = suite.read([nll])
                report(sum(map(len, scores.values())))
    attachment.detach(base.model)
    return scores


def _read_checkpoints(
    pipeline: Pipeline, seed: int
) -> dict[str, Float[Tensor, "checkpoints num_params"]]:
    finetune = pipeline.run.recipe.finetune
    every = pipeline.read_checkpoints()
    first = finetune.seeds.index(seed) * finetune.keep_last
    return {name: rows[first : first + finetune.keep_last] for name, rows in every.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tunes what is missing, scores it and writes finetune_seeds.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the adapters")
    parser.add_argument("--out", type=Path, required=True, help="folder of the bundles' results")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    name = SUITES["text"]
    bundle = read_bundle(BUNDLES_DIR / name)
    body = dict(bundle.provenance["recipe"])
    body["finetune"] = {**body["finetune"], "seeds": FURTHER_SEEDS}
    pipeline = Pipeline(RunDir.open(given.run, Recipe.model_validate(body)))
    bundle.check_base(pipeline.base.digest)
    pipeline.fine_tune_adapters()
    adapters = {f"own.{seed}": read_own(pipeline, seed) for seed in FURTHER_SEEDS}
    adapters[f"cond_p_diff.{FURTHER_SEEDS[0]}"] = generate_by_cond_p_diff(
        pipeline, FURTHER_SEEDS[0]
    )
    evaluation = json.loads((RESULTS_DIR / name / "evaluation.json").read_text(encoding="utf-8"))
    document = {
        "bundle": name_bundle(bundle),
        "commit": describe_commit(),
        "hardware": describe_hardware(),
        "settings": evaluation["settings"],
        "nats_per_token": score_adapters(pipeline, adapters, evaluation["settings"]),
    }
    write_text(given.out / name / RESULT_NAME, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
