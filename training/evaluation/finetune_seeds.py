"""Own adapters of further fine-tuning seeds, scored as the text evaluation scores those of seed 0.

    python -m training.evaluation.finetune_seeds --run runs/text-seeds --out training/results

How far apart are two fine-tunings of one task? A generated adapter is no better or worse than its
task's own one by less. Fine-tunes the shipped text bundle's tasks anew under seeds 1 and 2: about
50 minutes of one core a seed. It resumes, and several processes may share a run. Detection has its
further seeds in Table 4 (`icm-lora reproduce`).
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from service.synthesis.attachment import Attachment
from service.synthesis.bundle import read_bundle
from training.adapters import cut_windows, tokenize_documents
from training.checkpoint import read_tensors, write_text
from training.evaluation.report import describe_hardware, name_bundle
from training.evaluation.text import sum_window_nll
from training.pipeline import Pipeline, describe_commit
from training.progress import show_progress
from training.recipe import Recipe
from training.run_dir import RunDir
from training.shipped import BUNDLES_DIR, RESULTS_DIR, SUITES
from training.tasks.text import TextTask

SEEDS = (1, 2)
RESULT_NAME = "finetune_seeds.json"


def score_seeds(pipeline: Pipeline, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Nats a token of every task's own adapter, by fine-tuning seed and task.

    Args:
        pipeline: of a run whose adapters are all there.
        settings: of the evaluation: which windows.

    Raises:
        InvalidRecipeError: an adapter is missing: another process still fine-tunes it.
        InvalidTaskDataError: a task holds too few held-out windows.
    """
    pipeline.read_checkpoints()
    run, base = pipeline.run, pipeline.base
    seeds = run.recipe.finetune.seeds
    attachment = Attachment(base.model, pipeline.bases)
    scores: dict[str, dict[str, float]] = {str(seed): {} for seed in seeds}
    with show_progress("score seeds", len(seeds) * len(pipeline.tasks)) as report:
        for task in pipeline.tasks:
            assert isinstance(task, TextTask), "detection has no windows"
            windows = cut_windows(
                tokenize_documents(base, task.test),
                settings["num_windows"],
                settings["window_tokens"],
                settings["seed"],
            )
            for seed in seeds:
                own = read_tensors(run.adapter(task.name, seed))[0]["checkpoints"].float().mean(0)
                nll = sum_window_nll(base, attachment, own, windows)
                predicted = len(windows) * (windows.shape[1] - 1)
                scores[str(seed)][task.name] = float(nll.sum()) / predicted
                report(sum(map(len, scores.values())))
    attachment.detach(base.model)
    return scores


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
    body["finetune"] = {**body["finetune"], "seeds": SEEDS}
    pipeline = Pipeline(RunDir.open(given.run, Recipe.model_validate(body)))
    bundle.check_base(pipeline.base.digest)
    pipeline.fine_tune_adapters()
    evaluation = json.loads((RESULTS_DIR / name / "evaluation.json").read_text(encoding="utf-8"))
    document = {
        "bundle": name_bundle(bundle),
        "commit": describe_commit(),
        "hardware": describe_hardware(),
        "settings": evaluation["settings"],
        "nats_per_token": score_seeds(pipeline, evaluation["settings"]),
    }
    write_text(given.out / name / RESULT_NAME, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
