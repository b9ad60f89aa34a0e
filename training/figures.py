"""Figures of evaluations."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.evaluation.detection import DetectionResult
from training.evaluation.text import TaskResult
from training.evaluation.unseen_shares import MethodShare

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
    methods = tuple(COLORS)
    width = 0.8 / len(methods)
    with _open_axes((13, 5.2), path) as axes:
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


def draw_average_precision(results: Sequence[DetectionResult], path: Path) -> None:
    """Grouped bars: AP50 per category and method; higher is better."""
    methods = tuple(COLORS)
    width = 0.8 / len(methods)
    with _open_axes((15, 5.2), path) as axes:
        for offset, method in enumerate(methods):
            positions = [i + (offset - (len(methods) - 1) / 2) * width for i in range(len(results))]
            heights = [result.ap50[method].value for result in results]
            axes.bar(positions, heights, width, color=COLORS[method], label=LABELS[method])
            if method == "generated":
                low = [max(0.0, r.ap50[method].value - r.ap50[method].low) for r in results]
                high = [max(0.0, r.ap50[method].high - r.ap50[method].value) for r in results]
                axes.errorbar(
                    positions, heights, [low, high], fmt="none", ecolor="#444", elinewidth=0.8
                )
        titles = [r.title + ("" if r.known_to_base else " *") for r in results]
        axes.set_xticks(range(len(results)), titles, rotation=35, ha="right")
        axes.set_ylabel("AP50 on unseen instances (higher is better)")
        axes.set_title("Detection by category; * unknown to the base; lines: 95% over instances")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=len(methods), loc="upper center", fontsize=8)
        axes.margins(y=0.18, x=0.01)


def draw_specialisation(results: Sequence[DetectionResult], path: Path) -> None:
    """Heat maps: every adapter against every category, own and generated side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [result.name for result in results]
    figure, pair = pyplot.subplots(1, 2, figsize=(17, 8.5), layout="constrained")
    for axes, kind in zip(pair, ("own", "generated"), strict=True):
        rows = [[getattr(r, f"{kind}_row")[name] for name in names] for r in results]
        image = axes.imshow(rows, vmin=0, vmax=1, cmap="YlGnBu")
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                if value >= 0.05:
                    color = "white" if value > 0.6 else "black"
                    axes.text(
                        x,
                        y,
                        f"{value:.2f}"[1:] if value < 1 else "1",
                        ha="center",
                        va="center",
                        fontsize=6,
                        color=color,
                    )
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlabel("objects of category")
        axes.set_ylabel("adapter")
        axes.set_title(f"{kind} adapters: AP50")
    figure.colorbar(image, ax=pair, shrink=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def draw_shares(results: Sequence[MethodShare], judged: str, path: Path) -> None:
    """A row a method: mean share of the headroom with its interval, and that of gibberish."""
    rows = list(reversed(results))
    with _open_axes((9, 1.4 + 0.36 * len(rows)), path) as axes:
        for number, row in enumerate(rows):
            mean = row.share.mean
            color = COLORS["generated" if row.name == judged else "own"]
            axes.plot([mean.low, mean.high], [number, number], color=color, linewidth=2)
            axes.plot(mean.value, number, "o", color=color)
            if row.gibberish is not None:
                axes.plot(row.gibberish.mean.value, number, "x", color=COLORS["gibberish"])
        axes.axvline(0, color=COLORS["base"], linewidth=1)
        axes.axvline(1, color=COLORS["base"], linewidth=1)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.set_xlabel("share of the headroom: 0 the base, 1 the task's own adapter")
        axes.set_title("Unseen tasks: mean with 95% interval over families; x: told gibberish")
        axes.spines[["top", "right"]].set_visible(False)


@contextmanager
def _open_axes(size: tuple[float, float], path: Path) -> Iterator[Any]:
    """Axes of a figure that is saved as PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
