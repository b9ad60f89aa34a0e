"""RESULTS.md: tables and figures of the paper, and unseen tasks, from the committed JSON alone."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from training.checkpoint import write_text
from training.evaluation import detection_report, report
from training.reproduction.committed import PAPER_DIR, read_evaluation
from training.reproduction.row_store import StoredRow, read_table
from training.reproduction.seed_noise import list_noises, read_text_gaps, render_seed_noise
from training.reproduction.tables import (
    describe_machine,
    describe_runs,
    list_detection_losses,
    list_losses,
    list_storage_losses,
    list_text_losses,
    render_rows,
    render_storage,
)
from training.reproduction.unseen_results import (
    UNSEEN_DIRS,
    WHY_NOT_FURTHER,
    list_unseen_losses,
    read_unseen,
    render_unseen,
)
from training.reproduction.variants import SWEEPS
from training.shipped import RESULTS_DIR, SUITES

RESULTS_FILE = Path(__file__).parents[2] / "RESULTS.md"

TABLES: Mapping[int, str] = {
    1: "detection by category",
    2: "text by domain",
    3: "storage by method and rank",
    4: "ranks 1, 2, 4 and 8",
    5: "convolutional depth by rank, preset `paper`",
    6: "task vectors of text against those of pictures",
}

FIGURES: Mapping[int, str] = {
    2: "t-SNE of task vectors",
    4: "boxes by method",
    5: "boxes by rank",
}

_INTRO = """\
# The paper's tables and figures, measured here

Written by `icm-lora reproduce` from `training/results/`; no number is typed by hand. The paper is
"In-Context Meta LoRA Generation" (Shao et al., IJCAI 2025). Its own numbers are on Florence-2 with
COCO and on Llama-3-8B with The Pile, which are not to be had where this was measured. They are not
repeated here, and a number below must never be set beside the paper's as if the two were equal:
another base, other data, other tasks. What can be compared are the methods within a table.
`icm-lora reproduce --check` tests the targets again and measures a random sample anew."""

_DETECTION_SWEEP = """\
Embedded detector of the bundle `detection-embedded`, composited scenes. Adapters come from an
unseen wording (Table 6 also: unseen pictures) of each category and are prompted with the unseen
wording; the original model is asked in words that it was trained on. Our preset is decoded at
z = 0, preset `paper` draws z (its Eq. 9), both once a generator seed; alpha is the same at all
ranks. Preset `paper` is trained for fewer epochs than the paper says, to fit two CPU cores (recipe
`paper-detection`). COND P-DIFF is a re-implementation, as no code of it is public."""

_NOTES: Mapping[int, str] = {
    3: "Computed from layouts and from files that are written for it. The generator is decoder, "
    "statistics, task vectors and manifest of a bundle; bases are frozen factors that stored "
    "adapters need, too, and count on neither side; the encoder turns words into task vectors and "
    "may be shared with other uses, so the break-even is given without it and (with it).",
    4: _DETECTION_SWEEP,
    5: _DETECTION_SWEEP,
    6: _DETECTION_SWEEP
    + " Pictures become task vectors through ConSE (ImageNet classes as words), a stand-in for "
    "CLIP's image tower, which cannot be had here.",
}


def write_results(
    results: Path = RESULTS_DIR, paper: Path = PAPER_DIR, out: Path | None = None
) -> Path:
    """Writes RESULTS.md; returns its path.

    Args:
        results: folder of the bundles' evaluations.
        paper: folder of `table-N.json` and of the figures.
        out: the file; RESULTS.md at the top level where None.
    """
    path = out or RESULTS_FILE
    write_text(path, render_document(results, paper, path.parent))
    return path


def render_document(results: Path, paper: Path, root: Path) -> str:
    """The whole document; pictures are linked relative to `root`."""
    parts = [_INTRO]
    for number in TABLES:
        parts += [f"## Table {number}: {TABLES[number]}", *render_section(number, results, paper)]
    parts += ["## Seed noise", *_render_seed_noise(results, paper)]
    parts += ["## Steering margins of seen tasks", *_render_steering(results)]
    for suite, folder in UNSEEN_DIRS.items():
        parts += [f"## Unseen tasks: {suite}", *_render_unseen_suite(suite, results)]
        picture = results / folder / "unseen.png"
        if picture.exists():
            parts.append(f"![Unseen tasks: {suite}]({_relate(picture, root)})")
    parts += ["## Memorisation audit", *_render_audit(results)]
    parts += ["## In-distribution scores", *_render_acceptance(results)]
    for number, title in FIGURES.items():
        parts.append(f"## Figure {number}: {title}")
        picture = paper / f"figure-{number}.png"
        if picture.exists():
            parts += [_describe_figure(paper, number), f"![{title}]({_relate(picture, root)})"]
        else:
            parts.append(f"Not drawn yet: `icm-lora reproduce --figure {number}` draws it.")
    return "\n\n".join(parts) + "\n"


def render_section(number: int, results: Path, paper: Path) -> Iterator[str]:
    """Paragraphs of a table."""
    if number in (1, 2):
        yield from _render_suite("detection" if number == 1 else "text", results)
        return
    document = read_table(paper, number)
    if document is None:
        yield f"Not measured yet: `icm-lora reproduce --table {number}` measures it."
        return
    yield _NOTES[number]
    if number == 3:
        yield f"Commit `{document['commit']}`."
        yield _PAPERS_LINE
        yield render_storage(document["rows"])
        yield from _render_losses(list_storage_losses(document["rows"]))
        return
    rows: list[StoredRow] = document["rows"]
    everything = [
        row for table in SWEEPS for row in (read_table(paper, table) or {}).get("rows", ())
    ]
    yield (
        f"Recipe `{document['recipe']}` (`{document['recipe_digest'][:12]}`), "
        f"{rows[0]['num_scenes']} test scenes, {len(rows[0]['tasks'])} categories, fine-tuning "
        f"seeds {', '.join(map(str, document['finetune_seeds']))}; {describe_runs(rows)}."
    )
    yield _PAPERS_LINE
    owns = {row["adapters"]: row for row in everything if row["method"] == "own"}
    yield render_rows(rows, owns)
    yield from _render_losses(list_losses(rows, everything))
    yield (
        "mAP50: mean over categories, 95% interval over the instances of each; the difference to "
        "the own adapter is paired by category, its interval over categories."
    )


_PAPERS_LINE = (
    "The paper's own numbers are on Florence-2 with COCO and Llama-3-8B with The Pile: not "
    "reproduced here, and never comparable as if equal."
)


def _render_suite(suite: str, results: Path) -> Iterator[str]:
    if not (results / SUITES[suite] / "evaluation.json").exists():
        yield f"Not measured yet: `icm-lora evaluate --suite {suite}` measures it."
        return
    evaluation = read_evaluation(suite, results)
    document = evaluation.document
    bundle, provenance = document["bundle"], document["provenance"]
    settings = document["settings"]
    of = (
        f"Bundle `{bundle['name']}` {bundle['version']} (`{bundle['digest'][:12]}`), recipe "
        f"`{provenance['recipe_digest'][:12]}`, commit `{provenance['commit']}`; "
        f"{describe_machine(document['hardware'])}; "
    )
    if suite == "detection":
        yield (
            "The embedded detector on composited scenes, AP50 and AP75. "
            + of
            + f"{settings['num_scenes']} test scenes; generator seeds "
            + ", ".join(map(str, settings["generator_seeds"]))
            + ". `own` is the original LoRA, `soup` Model Soup, `generated` ours from an unseen "
            "wording; * unknown to the base. COND P-DIFF is in Table 4."
        )
        yield _PAPERS_LINE
        yield detection_report.render_table(evaluation.detection)
        yield from _render_losses(list_detection_losses(evaluation.detection))
        return
    yield (
        f"SmolLM2-135M-Instruct on {len(evaluation.text)} domains, held-out perplexity (lower is "
        "better), from one "
        "NLL sum with bits per character. "
        + of
        + f"{settings['num_windows']} windows of {settings['window_tokens']} tokens a domain, seed "
        f"{settings['seed']}. `own` is the original LoRA, `soup` Model Soup, `generated` ours from "
        "an unseen wording."
    )
    yield _PAPERS_LINE
    yield report.render_table(evaluation.text)
    if gaps := read_text_gaps(results):
        yield (
            f"COND P-DIFF (re-implemented), fitted to own adapters of another fine-tuning seed, is "
            f"{gaps['cond_p_diff']:+.4f} nats a token from these on the mean, `generated` "
            f"{gaps['generated']:+.4f} from its own."
        )
    yield from _render_losses(list_text_losses(evaluation.text))


def _render_seed_noise(results: Path, paper: Path) -> Iterator[str]:
    found = {name: noise for name, noise in list_noises(results, paper).items() if noise}
    if not found:
        job = "`python -m training.evaluation.finetune_seeds`"
        yield f"Not measured yet: `icm-lora reproduce --table 4` and {job} measure it."
        return
    yield from render_seed_noise(found)


def _render_unseen_suite(suite: str, results: Path) -> Iterator[str]:
    found = read_unseen(suite, results)
    if found is None:
        yield "Not measured yet: `icm-lora unseen` measures it."
        return
    yield from render_unseen(suite, found)
    yield from _render_losses([*list_unseen_losses(found.results)])
    yield WHY_NOT_FURTHER[suite]


def _render_audit(results: Path) -> Iterator[str]:
    yield from _render_tables(
        "audit",
        "Are generated adapters copies? Errors and cosines are of updates of the base (delta W): 0 "
        "and 1 would be the task's own adapter itself, which the generator was trained on; `less "
        "the mean adapter's` is what it knows beyond what all tasks have in common. `nearest "
        "other` is the nearest own adapter of another task, its distance relative to the generated "
        "update. `shared errors` are Jaccard indices of what is got wrong on held-out data: with "
        "the task's own adapter, and with that other one.",
        results,
    )


def _render_steering(results: Path) -> Iterator[str]:
    yield from _render_tables(
        "seen_steering",
        "Is it what the words say that makes an adapter good? The margin is the score under the "
        "task's unseen wording less that under the best of the wrong words; shown of each kind is "
        "the best. What the base is asked is the same throughout. AP50, or nats a token, of which "
        "fewer are better. Where gibberish comes near, it fell upon the task's own key among few; "
        "serving refuses it (see in-distribution scores).",
        results,
    )


def _render_acceptance(results: Path) -> Iterator[str]:
    yield from _render_tables(
        "acceptance",
        "AUROC: the probability that a held-out wording of a training task scores above such "
        "words, 0.5 if the score cannot tell them apart.",
        results,
    )


def _render_tables(job: str, about: str, results: Path) -> Iterator[str]:
    """What a job of `training.evaluation` wrote about each bundle."""
    found = [results / name / f"{job}.md" for name in SUITES.values()]
    found = [path for path in found if path.exists()]
    if not found:
        yield f"Not measured yet: `python -m training.evaluation.{job}` measures it."
        return
    yield about
    for path in found:
        yield path.read_text(encoding="utf-8").strip()


def _render_losses(losses: Sequence[str]) -> Iterator[str]:
    if losses:
        yield "Where we lose:\n\n" + "\n".join(f"- {line}" for line in losses)
    else:
        yield "Where we lose: nowhere in this table."


def _describe_figure(paper: Path, number: int) -> str:
    document = json.loads((paper / f"figure-{number}.json").read_text(encoding="utf-8"))
    machine = describe_machine(document["hardware"])
    return f"{document['caption']} Commit `{document['commit']}`; {machine}."


def _relate(path: Path, root: Path) -> str:
    try:
        return path.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return path.name
