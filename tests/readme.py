"""The README's measured and rendered parts; `python -m tests.readme` writes them.

A test compares README.md with these, so no number in it is typed by hand.
"""

import json
from pathlib import Path

from service.settings import render_settings_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "training" / "results" / "text-smollm2"
DETECTION_RESULTS = ROOT / "training" / "results" / "detection-embedded"


def render_blocks() -> dict[str, str]:
    """Content between `<!-- name -->` and `<!-- /name -->`, by name."""
    transcript = (RESULTS / "demo.txt").read_text().strip()
    return {
        "demo": f"```\n{transcript}\n```",
        "results": (RESULTS / "evaluation.md").read_text().strip(),
        "detection": (DETECTION_RESULTS / "evaluation.md").read_text().strip(),
        "bench": _render_bench(json.loads((RESULTS / "bench.json").read_text())),
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


def _render_bench(document: dict[str, list[dict[str, object]]]) -> str:
    lines = ["| measured | value | target |", "|---|--:|--:|"]
    for row in document["measurements"]:
        sign = "≤" if row["at_most"] else "≥"
        lines.append(
            f"| {row['name']} | {row['value']:.3g} {row['unit']} "
            f"| {sign} {row['target']:g} {row['unit']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    write_blocks(ROOT / "README.md")
