"""Markdown of the tables, from their JSON alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from training.evaluation.detection import DetectionResult, mean_ap50
from training.evaluation.statistics import Interval, resample_ratio
from training.evaluation.text import MAX_PPL_RATIO, TaskResult
from training.reproduction.row_store import StoredRow
from training.reproduction.variants import FINETUNE_SEED

REFERENCES = ("own", "soup", "cond_p_diff")
"""What generators are compared with."""

LABELS = {
    "base": "original model",
    "own": "own adapter (original LoRA)",
    "soup": "Model Soup",
    "cond_p_diff": "COND P-DIFF (re-implemented)",
    "token": "ours (preset `token`)",
    "in_context": "ours (preset `in_context`)",
    "paper": "ICM-LoRA as published (preset `paper`)",
}


def render_storage(rows: Sequence[StoredRow]) -> str:
    """Table 3: bytes of one stored adapter against those of a generator and its parts."""
    lines = [
        "| bundle | generator | rank | numbers an adapter | adapter, float16 | adapter, int8 "
        "| generator | bases | encoder | tasks to break even, float16 | int8 |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        even = row["break_even"]
        cells = [
            f"{row['bundle']} ({row['kind']}, {row['tasks']} tasks)",
            f"`{row['preset']}`" + (", shipped" if row["shipped"] else ""),
            str(row["rank"]),
            f"{row['adapter_params']:,}",
            *(f"{row[part] / 1000:,.1f} kB" for part in ("fp16_adapter", "int8_adapter")),
            *(f"{row[part] / 1e6:,.2f} MB" for part in ("generator", "bases", "encoder")),
            *(f"{even[k]['alone']:,} ({even[k]['with_encoder']:,})" for k in ("fp16", "int8")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def list_storage_losses(rows: Sequence[StoredRow]) -> list[str]:
    """Where a shipped generator takes more bytes than stored adapters, or than preset `paper`."""
    losses = []
    for row in rows:
        if not row["shipped"]:
            continue
        even, name = row["break_even"]["fp16"], f"{row['bundle']}, rank {row['rank']}"
        if row["tasks"] < even["alone"]:
            losses.append(
                f"{name}: the generator was trained on {row['tasks']} tasks and is smaller than "
                f"stored adapters from {even['alone']:,} tasks on (with the encoder "
                f"{even['with_encoder']:,})."
            )
        for other in rows:
            is_same = (other["bundle"], other["rank"]) == (row["bundle"], row["rank"])
            if is_same and other["generator"] < row["generator"]:
                losses.append(
                    f"{name}: preset `{other['preset']}` takes {other['generator'] / 1e6:,.2f} MB, "
                    f"ours {row['generator'] / 1e6:,.2f} MB."
                )
    return losses


def render_rows(rows: Sequence[StoredRow], owns: Mapping[str, StoredRow]) -> str:
    """Tables 4, 5 and 6: a line a row, means over tasks.

    Args:
        rows: of the table.
        owns: rows of own adapters, of any table, by the digest of the adapters.
    """
    labels = dict.fromkeys(name for row in rows for name in row["label"])
    names = [name for name in labels if name != FINETUNE_SEED]
    lines = [
        "| "
        + " | ".join([*names, "method", "numbers an adapter", "parameters of the generator"])
        + " | mAP50 (95% CI) | mAP75 | mAP50 - own adapter's (95% CI over tasks) | seeds |",
        "|" + "--:|" * len(names) + "---|" + "--:|" * 6,
    ]
    for row in rows:
        own = owns.get(row["adapters"])
        is_compared = own is not None and row["method"] not in ("base", "own")
        gap = describe_interval(compare(row, own)) if own is not None and is_compared else "-"
        cells = [
            *(str(row["label"].get(name, "-")) for name in names),
            _name_method(row),
            f"{row['adapter_params']:,}" if row["adapter_params"] else "-",
            f"{row['generator_params']:,}" if row["generator_params"] else "-",
            f"{row['ap50']['value']:.3f} ({row['ap50']['low']:.3f} to {row['ap50']['high']:.3f})",
            f"{row['ap75']:.3f}",
            gap,
            ", ".join(map(str, row["seeds"])) or "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name_method(row: StoredRow) -> str:
    seed = row["label"].get(FINETUNE_SEED)
    return LABELS[row["method"]] + ("" if seed is None else f", {FINETUNE_SEED} {seed}")


def compare(ours: StoredRow, theirs: StoredRow) -> Interval:
    """Paired difference of AP50, mean over the tasks of both, with an interval over tasks."""
    names = [name for name in ours["tasks"] if name in theirs["tasks"]]
    differences = torch.tensor(
        [
            ours["tasks"][name]["ap50"]["value"] - theirs["tasks"][name]["ap50"]["value"]
            for name in names
        ],
        dtype=torch.float64,
    )
    return resample_ratio(differences, torch.ones(len(differences))).interval()


def describe_interval(interval: Interval) -> str:
    """A difference with its interval."""
    return f"{interval.value:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def list_losses(rows: Sequence[StoredRow], all_rows: Sequence[StoredRow]) -> list[str]:
    """Where a generator is behind another method on the same adapters, or behind the base.

    Args:
        rows: of the table.
        all_rows: of all tables: own adapters and the base may be in another one.
    """
    losses = []
    for row in rows:
        if not row["generator_params"] or row["method"] == "cond_p_diff":
            continue
        label = ", ".join(f"{name} {value}" for name, value in row["label"].items())
        for method in REFERENCES:
            other = next(
                (
                    each
                    for each in all_rows
                    if (each["method"], each["adapters"]) == (method, row["adapters"])
                ),
                None,
            )
            if other is None:
                continue
            difference = compare(row, other)
            if difference.value < 0:
                inside = "" if difference.high < 0 else ", an interval that holds 0"
                losses.append(
                    f"{label}: {LABELS[row['method']]} is behind {LABELS[method]} by "
                    f"{describe_interval(difference)} AP50{inside}."
                )
        base = next((each for each in all_rows if each["method"] == "base"), None)
        if base is not None:
            better = [
                name
                for name, score in base["tasks"].items()
                if name in row["tasks"]
                and score["ap50"]["value"] > row["tasks"][name]["ap50"]["value"]
            ]
            if better:
                losses.append(
                    f"{label}: the original model finds {len(better)} of {len(row['tasks'])} "
                    f"categories better than {LABELS[row['method']]}."
                )
    return losses


def list_detection_losses(results: Sequence[DetectionResult]) -> list[str]:
    """Where the generated adapters of the shipped detection bundle are behind."""
    base = [r for r in results if r.ap50["base"].value > r.ap50["generated"].value]
    own = [r for r in results if r.mean_generated_ap50 < r.ap50["own"].value]
    clear = [r for r in results if r.gap.high < 0]
    means = mean_ap50(results)
    losses = []
    if base:
        losses.append(
            f"The original model is better on {len(base)} of {len(results)} categories: "
            + ", ".join(
                f"{r.title} ({r.ap50['base'].value:.3f} against {r.ap50['generated'].value:.3f})"
                for r in base
            )
            + "."
        )
    losses.append(
        f"The own adapter is better on {len(own)} of {len(results)} categories (mean over "
        f"generator seeds), on {len(clear)} of them by more than the paired interval"
        + (": " + ", ".join(r.title for r in clear) if clear else "")
        + f". Means: own {means['own']:.3f}, generated {means['generated']:.3f}."
    )
    return losses


def list_text_losses(results: Sequence[TaskResult]) -> list[str]:
    """Where the generated adapters of the shipped text bundle are behind their own ones."""
    behind = [r for r in results if r.ppl_ratio.value > 1]
    clear = [r for r in behind if r.ppl_ratio.low > 1]
    shown = ", ".join(
        f"{r.title} (ratio {r.ppl_ratio.value:.4f}, {r.ppl_ratio.low:.4f} to "
        f"{r.ppl_ratio.high:.4f})"
        for r in clear
    )
    losses = [
        f"The own adapter is better on {len(behind)} of {len(results)} domains, on {len(clear)} of "
        "them by more than the paired interval" + (f": {shown}." if clear else ".")
    ]
    gibberish = [
        r for r in results if r.scores["gibberish"].ppl <= MAX_PPL_RATIO * r.scores["generated"].ppl
    ]
    if gibberish:
        losses.append(
            f"An adapter generated from gibberish is within a factor of {MAX_PPL_RATIO:g} of the "
            "one generated from the description on: " + ", ".join(r.title for r in gibberish) + "."
        )
    return losses


def describe_runs(rows: Sequence[Mapping[str, Any]]) -> str:
    """Commits and hardware of rows, each once."""
    commits = ", ".join(f"`{each}`" for each in dict.fromkeys(row["commit"] for row in rows))
    machines = dict.fromkeys(describe_machine(row["hardware"]) for row in rows)
    return f"commit {commits}; {'; '.join(machines)}"


def describe_machine(hardware: Mapping[str, Any]) -> str:
    """Processor, cores, accelerator and torch of a measurement."""
    accelerator = hardware["accelerator"]
    parts = [f"{hardware['processor']}, {hardware['cores']} cores"]
    if accelerator != "none":
        parts.append(accelerator)
    return ", ".join([*parts, f"torch {hardware['torch']}"])
