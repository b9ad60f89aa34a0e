"""Reports of the text suite: JSON, a Markdown table and a bar chart."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from service.synthesis.bundle import Bundle
from service.synthesis.packed_weight import has_bfloat16_products
from training.checkpoint import write_text
from training.evaluation.text import METHODS, TaskResult, to_json


def describe_hardware() -> dict[str, Any]:
    """Processor, its instructions, cores and versions that a result depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0].split(":", 1)[1].strip() if names else model
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_products": has_bfloat16_products(),
        "accelerator": accelerator,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def render_table(results: Sequence[TaskResult]) -> str:
    """Markdown: one row per task, perplexities by method, ratio with interval."""
    lines = [
        "| task | base | own | soup | gibberish | generated | generated / own (95% CI) "
        "| nats/token base, own, generated | BPC base, own, generated |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        ppl = {method: f"{result.scores[method].ppl:.2f}" for method in METHODS}
        shown = ("base", "own", "generated")
        nats = ", ".join(f"{result.scores[m].nats_per_token:.3f}" for m in shown)
        bpc = ", ".join(f"{result.scores[m].bpc:.3f}" for m in shown)
        ratio = result.ppl_ratio
        lines.append(
            f"| {result.title} | {ppl['base']} | {ppl['own']} | {ppl['soup']} "
            f"| {ppl['gibberish']} | {ppl['generated']} "
            f"| {ratio.value:.4f} ({ratio.low:.4f} to {ratio.high:.4f}) | {nats} | {bpc} |"
        )
    return "\n".join(lines)


def name_bundle(bundle: Bundle) -> dict[str, str]:
    """What results say of the bundle that they are of, as JSON."""
    return {"name": bundle.name, "version": bundle.version, "digest": bundle.digest}


def write_document(
    folder: Path,
    bundle: Bundle,
    settings: Mapping[str, Any],
    tasks: Sequence[Mapping[str, object]],
) -> None:
    """Writes evaluation.json: what was measured, of which bundle, how and on what."""
    document = {
        "bundle": name_bundle(bundle),
        "provenance": {k: v for k, v in bundle.provenance.items() if k != "recipe"},
        "hardware": describe_hardware(),
        "settings": dict(settings),
        "tasks": list(tasks),
    }
    write_text(folder / "evaluation.json", json.dumps(document, indent=1) + "\n")


def write_report(
    folder: Path, results: Sequence[TaskResult], bundle: Bundle, settings: Mapping[str, Any]
) -> None:
    """Writes evaluation.json, evaluation.md and evaluation.png."""
    from training.figures import draw_perplexities

    write_document(folder, bundle, settings, to_json(results))
    header = (
        f"Held-out perplexity, bundle `{bundle.name}` {bundle.version} "
        f"(`{bundle.digest[:12]}`, recipe `{bundle.provenance['recipe_digest'][:12]}`, "
        f"commit `{bundle.provenance['commit']}`); {settings['num_windows']} windows of "
        f"{settings['window_tokens']} tokens per task, seed {settings['seed']}. "
        "`generated`: from an unseen wording alone, z = 0. `soup`: mean of all own adapters. "
        f'`gibberish`: generated from "{settings["gibberish"]}".\n\n'
    )
    write_text(folder / "evaluation.md", header + render_table(results) + "\n")
    draw_perplexities(results, folder / "evaluation.png")
