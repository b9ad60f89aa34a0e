"""The README's measured and rendered parts; `python -m tests.readme` writes them.

A test compares README.md with these, so no number in it is typed by hand.
"""

import json
from pathlib import Path
from typing import Any

import service.api.app  # noqa: F401 - all errors are then defined
from service.api.error_table import render_errors_table
from service.settings import render_settings_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "training" / "results" / "text-smollm2"
DETECTION_RESULTS = ROOT / "training" / "results" / "detection-embedded"
FAMILIES_RESULTS = ROOT / "training" / "results" / "text-families"
SERVING_RESULTS = ROOT / "training" / "results" / "serving"
SERVING_COMMANDS = {
    "serving": "bench-serving",
    "serving-bfloat16": "bench-serving",
    "scaling": "bench-scaling",
    "interference": "bench-interference",
    "overload": "bench-overload",
    "chaos": "chaos",
    "fuzz": "fuzz",
}
"""Result files of text serving, and the targets of make that write them."""


def render_blocks() -> dict[str, str]:
    """Content between `<!-- name -->` and `<!-- /name -->`, by name."""
    transcript = (RESULTS / "demo.txt").read_text().strip()
    return {
        "demo": f"```\n{transcript}\n```",
        "results": (RESULTS / "evaluation.md").read_text().strip(),
        "refinement": (RESULTS / "refinement.md").read_text().strip(),
        "unseen": (FAMILIES_RESULTS / "unseen.md").read_text().strip(),
        "detection": (DETECTION_RESULTS / "evaluation.md").read_text().strip(),
        "bench": _render_bench(json.loads((RESULTS / "bench.json").read_text())),
        "serving": _render_serving(SERVING_RESULTS),
        "errors": render_errors_table(),
        "settings": render_settings_table().strip(),
    }


def read_block(text: str, name: str) -> str:
    """What lies between a block's markers."""
    return text.split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip()


def write_blocks(path: Path) -> None:
    """Rewrites every block of a file."""
    text = path.read_text()
    for name, content in render_blocks().items():
        head, rest = text.split(f"<!-- {name} -->")
        tail = rest.split(f"<!-- /{name} -->")[1]
        text = f"{head}<!-- {name} -->\n{content}\n<!-- /{name} -->{tail}"
    path.write_text(text)


def _render_bench(document: dict[str, Any]) -> str:
    lines = ["| measured | value | target |", "|---|--:|--:|"]
    return "\n".join([*lines, *map(_render_row, document["measurements"])])


def _render_row(row: dict[str, Any]) -> str:
    number = f"{row['value']:,.0f}" if row["value"] >= 1_000 else f"{row['value']:.3g}"
    value = f"{number} {row['unit']}".strip()
    if row["target"] is None:
        return f"| {row['name']} | {value} | |"
    sign = "≤" if row["at_most"] else "≥"
    target = f"{sign} {row['target']:,g} {row['unit']}".strip()
    missed = "" if row["met"] else ", **missed**"
    return f"| {row['name']} | {value} | {target}{missed} |"


def _render_serving(folder: Path) -> str:
    """What there is of the results of text serving; the table of adapters in full."""
    found = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in SERVING_COMMANDS
        if (folder / f"{name}.json").exists()
    }
    if not found:
        return "Not measured yet."
    lines = ["| measured | value | target |", "|---|--:|--:|"]
    for name, document in found.items():
        peer = document["setup"].get("vllm")
        made_by = f"`make {SERVING_COMMANDS[name]}`, commit `{document['commit']}`"
        if "serving" in name:  # on two kinds of CPU
            made_by += f", {document['hardware']['vectors']}"
        lines.append(f"| *{document['title']}* ({made_by}{f', vLLM {peer}' if peer else ''}) | | |")
        rows = document["measurements"]
        shown = rows if name != "scaling" else [row for row in rows if row["target"] is not None]
        lines += map(_render_row, shown)
    if (folder / "scaling.md").exists():
        table = (folder / "scaling.md").read_text().strip()
        lines += ["", "Tokens per second by number of adapters and request mix:", "", table]
    return "\n".join(lines)


if __name__ == "__main__":
    write_blocks(ROOT / "README.md")
