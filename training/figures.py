"""Figures of evaluations."""

from collections.abc import Sequence
from pathlib import Path

from training.evaluation.text import TaskResult

COLORS = {
    "base": "#b0b7c3",
    "gibberish": "#d9c3a5",
    "soup": "#e0a458",
    "own": "#35618f",
    "generated": "#2a9d6f",
}
LABELS = {
    "base": "base model",
    "gibberish": "generated from gibberish",
    "soup": "mean of all adapters (soup)",
    "own": "own adapter (fine-tuned)",
    "generated": "generated from words",
}


def draw_perplexities(results: Sequence[TaskResult], path: Path) -> None:
    """Grouped bars: held-out perplexity per task and method; lower is better."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = tuple(COLORS)
    width = 0.8 / len(methods)
    figure, axes = pyplot.subplots(figsize=(13, 5.2), layout="constrained")
    for offset, method in enumerate(methods):
        heights = [result.scores[method].ppl for result in results]
        positions = [i + (offset - (len(methods) - 1) / 2) * width for i in range(len(results))]
        bars = axes.bar(positions, heights, width, color=COLORS[method], label=LABELS[method])
        if method == "generated":
            axes.bar_label(
                bars, [f"{r.ppl_ratio.value:.3f}" for r in results], fontsize=7, padding=2
            )
    axes.set_xticks(range(len(results)), [r.title for r in results], rotation=25, ha="right")
    axes.set_ylabel("held-out perplexity (lower is better)")
    axes.set_title("Perplexity by domain; above the green bars: generated / own adapter")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(methods), loc="upper center", fontsize=8)
    axes.margins(y=0.15, x=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
