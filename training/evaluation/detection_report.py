"""Reports of the detection suite: JSON, Markdown tables, a bar chart and a heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from service.synthesis.bundle import Bundle
from training.checkpoint import write_text
from training.evaluation.detection import (
    DetectionResult,
    mean_ap50,
    mean_ap75,
    to_json,
)
from training.evaluation.report import write_document

SHOWN_AP75 = ("base", "own", "soup", "generated")


def render_table(results: Sequence[DetectionResult]) -> str:
    """Markdown, as the paper's Table 1: one row per category, AP50 and AP75 by method."""
    lines = [
        "| category | base | own | soup | gibberish | generated | generator seeds "
        "| generated - own (95% CI) | AP75 base, own, soup, generated | objects (instances) |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in results:
        star = "" if each.known_to_base else " *"
        cells = [f"{each.ap50[m].value:.3f}" for m in ("base", "own", "soup", "gibberish")]
        generated = each.ap50["generated"]
        cells.append(f"{generated.value:.3f} ({generated.low:.2f} to {generated.high:.2f})")
        cells.append(", ".join(f"{value:.3f}" for value in each.seed_ap50.values()) or "-")
        cells.append(f"{each.gap.value:+.3f} ({each.gap.low:+.3f} to {each.gap.high:+.3f})")
        cells.append(", ".join(f"{each.ap75[m]:.3f}" for m in SHOWN_AP75))
        cells.append(f"{each.objects} ({each.instances})")
        lines.append(f"| {each.title}{star} | " + " | ".join(cells) + " |")
    for title, chosen in _groups(results):
        fifty, seventy = mean_ap50(chosen), mean_ap75(chosen)
        cells = [f"**{fifty[m]:.3f}**" for m in ("base", "own", "soup", "gibberish", "generated")]
        gap = fifty["generated"] - fifty["own"]
        shown = ", ".join(f"{seventy[m]:.3f}" for m in SHOWN_AP75)
        lines.append(
            f"| **{title}** | " + " | ".join([*cells, "-", f"{gap:+.3f}", shown, "-"]) + " |"
        )
    return "\n".join(lines)


def render_matrix(results: Sequence[DetectionResult], kind: str) -> str:
    """Markdown: AP50 of each task's adapter (rows) against each category's objects (columns).

    Args:
        results: of the suite.
        kind: `own` or `generated`.
    """
    names = [each.name for each in results]
    lines = ["| adapter | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for each in results:
        row = getattr(each, f"{kind}_row")
        best = max(row, key=lambda category: row[category])
        cells = [f"**{row[n]:.2f}**" if n == best else f"{row[n]:.2f}" for n in names]
        lines.append(f"| {each.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_detection_report(
    folder: Path, results: Sequence[DetectionResult], bundle: Bundle, settings: Mapping[str, Any]
) -> None:
    """Writes evaluation.json, evaluation.md, specialisation.md and their figures."""
    from training.figures import draw_average_precision, draw_specialisation

    write_document(folder, bundle, settings, to_json(results))
    of = (
        f"bundle `{bundle.name}` {bundle.version} (`{bundle.digest[:12]}`, recipe "
        f"`{bundle.provenance['recipe_digest'][:12]}`, commit `{bundle.provenance['commit']}`); "
        f"{settings['num_scenes']} composited test scenes, instances and backgrounds that no "
        "training saw"
    )
    header = (
        f"AP50 on {of}. `generated`: from an unseen wording alone, z = 0, with its interval from a "
        "bootstrap over instances; `generator seeds`: the same from generators trained with other "
        "seeds, whose mean with the shipped one is in the last rows. `soup`: mean of all own "
        f'adapters. `gibberish`: generated from "{settings["gibberish"]}". The base is asked in '
        "words that it was trained on, all others in the unseen wording. * the base never saw "
        "this category.\n\n"
    )
    write_text(folder / "evaluation.md", header + render_table(results) + "\n")
    matrices = "\n\n".join(
        f"## {kind.capitalize()} adapters\n\n{render_matrix(results, kind)}"
        for kind in ("own", "generated")
    )
    intro = (
        f"# Specialisation\n\nAP50 of each adapter's boxes against the objects of each category, "
        f"on {of}. Each adapter is prompted with its own task's unseen wording; the best column "
        "of a row is bold.\n\n"
    )
    write_text(folder / "specialisation.md", intro + matrices + "\n")
    draw_average_precision(results, folder / "evaluation.png")
    draw_specialisation(results, folder / "specialisation.png")


def _groups(
    results: Sequence[DetectionResult],
) -> list[tuple[str, Sequence[DetectionResult]]]:
    groups = [
        ("mean", list(results)),
        ("mean, known to the base", [r for r in results if r.known_to_base]),
        ("mean, unknown to the base", [r for r in results if not r.known_to_base]),
    ]
    return [(title, chosen) for title, chosen in groups if chosen]
