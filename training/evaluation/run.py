"""Evaluation of a bundle: loads what its suite needs, measures, prints, writes the report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from service.errors import InvalidInputError
from service.synthesis.synthesizer import Synthesizer
from training.checkpoint import read_tensors, write_text
from training.detection_examples import encode_scenes
from training.evaluation import detection, detection_report, report, text
from training.evaluation.bundle_base import load_bundle_base
from training.evaluation.pictures import draw_comparison
from training.evaluation.unseen import UnseenEvaluation, UnseenSettings
from training.evaluation.unseen_methods import build_method
from training.evaluation.unseen_shares import average_scores, render_shares, summarize_unseen
from training.evaluation.unseen_suites import DetectionSuite, TextSuite, UnseenSuite
from training.pipeline import Pipeline, describe_commit
from training.progress import show_progress
from training.recipe import Recipe
from training.run_dir import RunDir
from training.tasks.composites import read_categories
from training.tasks.detection import load_detection_data
from training.tasks.text import load_text_tasks


def evaluate_text_bundle(
    synthesizer: Synthesizer,
    own_path: Path,
    names: Sequence[str],
    *,
    num_windows: int,
    window_tokens: int,
    seed: int,
    out: Path | None,
) -> list[str]:
    """Runs the text suite; returns a line for every target that is missed."""
    bundle = synthesizer.bundle
    recipe = Recipe.model_validate(bundle.provenance["recipe"])
    tasks = load_text_tasks(recipe.tasks.source, names)
    own, _ = read_tensors(own_path)
    base = load_bundle_base(bundle, recipe)
    with show_progress("evaluate", len(tasks) * len(text.METHODS)) as show:
        results = text.evaluate_text(
            synthesizer,
            own,
            base,
            tasks,
            num_windows=num_windows,
            window_tokens=window_tokens,
            seed=seed,
            report=show,
        )
    print(report.render_table(results))
    if out is not None:
        settings = {
            "suite": "text",
            "num_windows": num_windows,
            "window_tokens": window_tokens,
            "seed": seed,
            "dtype": recipe.base.dtype,
            "gibberish": text.GIBBERISH,
        }
        report.write_report(out, results, bundle, settings)
    return [
        f"{result.name}: generated / own = {result.ppl_ratio.value:.4f} > {text.MAX_PPL_RATIO}"
        for result in results
        if result.ppl_ratio.value > text.MAX_PPL_RATIO
    ]


def evaluate_detection_bundle(
    synthesizer: Synthesizer,
    own_path: Path,
    names: Sequence[str],
    *,
    num_scenes: int | None,
    out: Path | None,
) -> list[str]:
    """Runs the detection suite; returns a line for every target that is missed."""
    bundle = synthesizer.bundle
    recipe = Recipe.model_validate(bundle.provenance["recipe"])
    data = load_detection_data(recipe.tasks.source, names)
    own, _ = read_tensors(own_path)
    seeds_path = own_path.with_name("seed_adapters.safetensors")
    seeds = read_tensors(seeds_path)[0] if seeds_path.exists() else {}
    base = load_bundle_base(bundle, recipe)
    objects = data.test.objects[:num_scenes]
    features = encode_scenes(base, data.test, range(len(objects)))
    known = read_categories() if recipe.detector is not None else {}
    num_seeds = len({key.rpartition(".")[2] for key in seeds})
    with show_progress("evaluate", detection.count_passes(len(names), num_seeds)) as show:
        results = detection.evaluate_detection(
            synthesizer,
            own,
            seeds,
            base,
            data.tasks,
            {task.name: known.get(task.name, False) for task in data.tasks},
            features,
            objects,
            show,
        )
    print(detection_report.render_table(results))
    for kind in ("own", "generated"):
        print(f"\n{kind} adapters against every category\n")
        print(detection_report.render_matrix(results, kind))
    if out is not None:
        settings = {
            "suite": "detection",
            "num_scenes": len(features),
            "generator_seeds": list(recipe.generator_seeds),
            "dtype": recipe.base.dtype,
            "gibberish": text.GIBBERISH,
        }
        detection_report.write_detection_report(out, results, bundle, settings)
        draw_comparison(synthesizer, base, data, out / "pictures.png")
    return list(detection.check_detection(results).missed)


def evaluate_unseen(
    run: RunDir,
    names: Sequence[str],
    settings: UnseenSettings,
    *,
    num_windows: int,
    window_tokens: int,
    out: Path | None,
) -> None:
    """Scores a run's tasks as unseen ones, prints and writes the shares of the headroom.

    Args:
        run: whose adapters are all there.
        names: methods; the first is judged against the others.
        settings: how they are fitted.
        num_windows: held-out windows of each text task.
        window_tokens: of each.
        out: folder for `unseen.json`, `unseen.md` and `unseen.png`.

    Raises:
        InvalidInputError: an unknown method, or one with a description where there are no prompts.
    """
    from training.figures import draw_shares

    methods = {name: build_method(name, run.recipe) for name in names}
    pipeline = Pipeline(run)
    suite: UnseenSuite = (
        TextSuite(pipeline.base, num_windows, window_tokens)
        if pipeline.detection is None
        else DetectionSuite(pipeline.base, pipeline.detection)
    )
    prompted = any(method.prompt is not None for method in methods.values())
    if prompted and pipeline.detection is not None:
        raise InvalidInputError("detection reads its words anyway: leave out what follows a +")
    job = UnseenEvaluation(pipeline, methods, suite, settings)
    with show_progress("unseen", job.num_scores) as show:
        scores = job.score(show)
    tasks = job.training_tasks
    families = dict(zip(tasks.names, tasks.families, strict=True))
    own_seeds = run.recipe.finetune.seeds
    results = summarize_unseen(scores, families, names, suite, settings.seeds, own_seeds)
    table = render_shares(results, suite.unit)
    print(table)
    if out is None:
        return
    body = {
        "settings": {**asdict(settings), **suite.settings},
        "recipe": run.recipe.to_json(),
        "recipe_digest": run.recipe.digest,
        "commit": describe_commit(),
        "hardware": report.describe_hardware(),
        "methods": {name: dict(method.options) for name, method in methods.items()},
        "families": families,
        "unit": suite.unit,
        "base": average_scores(suite, [[each["base"]] for each in scores.values()]),
        "own": average_scores(
            suite, [[each[f"own.{seed}"] for seed in own_seeds] for each in scores.values()]
        ),
        "results": [asdict(result) for result in results],
    }
    write_text(out / "unseen.json", json.dumps(body, indent=1) + "\n")
    write_text(out / "unseen.md", table + "\n")
    draw_shares(results, names[0], out / "unseen.png")
