"""The subcommand `icm-lora reproduce`; imports what a job needs when it runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from service.errors import InvalidInputError

if TYPE_CHECKING:
    from service.synthesis.bundle import Bundle
    from service.synthesis.task_encoder import TaskEncoder

ABOUT = """\
Measures the paper's tables and figures on the bases and data that are here, and writes RESULTS.md.
What is finished is kept, row by row: the same command again goes on where it was stopped. Tables 1
and 2 come from the committed evaluations, table 3 is computed in seconds; 4, 5 and 6 train."""

COSTS = """\
About so long on two CPU cores, by the processor time of single steps: table 4 one hour and another
one and a half a generator seed; table 5 then five hours a seed; table 6 then half an hour a seed;
tables 1 to 3 and figure 2 seconds; --check two minutes. The scenes are composed once, in half an
hour. Tables 5 and 6 take from table 4 what it has, so measure it first; --seeds 0 is cheapest."""

AddParser = Callable[[str, Callable[[argparse.Namespace], int], str], argparse.ArgumentParser]


def add_reproduce_command(add: AddParser) -> argparse.ArgumentParser:
    """Adds `icm-lora reproduce`."""
    sub = add("reproduce", run_reproduce, "measure the paper's tables and figures")
    sub.description = ABOUT
    sub.epilog = COSTS
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", type=int, choices=range(1, 7), metavar="N", help="1 to 6")
    what.add_argument("--figure", type=int, choices=(2, 4, 5), metavar="N", help="2, 4 or 5")
    what.add_argument("--check", action="store_true", help="test targets, measure a sample again")
    what.add_argument("--write", action="store_true", help="only write RESULTS.md")
    sub.add_argument("--recipe", default="detection-embedded", help="of tables 4, 5 and 6")
    sub.add_argument("--work", type=Path, default=Path("runs/reproduction"), metavar="DIR")
    sub.add_argument(
        "--out", type=Path, metavar="DIR", help="of JSON and figures (default: the committed ones)"
    )
    sub.add_argument(
        "--seeds", type=int, nargs="+", metavar="SEED", help="generators (default: the recipe's)"
    )
    sub.add_argument("--limit", type=int, metavar="ROWS", help="rows to measure at most")
    return sub


def run_reproduce(arguments: argparse.Namespace) -> int:
    """Runs the job; RESULTS.md is written after each table and figure."""
    from training.reproduction.committed import PAPER_DIR
    from training.reproduction.document import render_section, write_results

    if arguments.limit is not None and arguments.limit < 1:
        raise InvalidInputError("--limit is a number of rows, at least 1")
    out: Path = arguments.out or PAPER_DIR
    if arguments.check:
        return _check(out)
    try:
        if arguments.table is not None:
            _measure(arguments, out)
        elif arguments.figure is not None:
            _draw(arguments, out)
    finally:  # also of an interrupted job: what is finished is to be seen
        path = write_results(paper=out, out=arguments.out and out / "RESULTS.md")
    if arguments.table is not None:
        from training.shipped import RESULTS_DIR

        print("\n\n".join(render_section(arguments.table, RESULTS_DIR, out)))
    print(f"wrote {path}")
    return 0


def _measure(arguments: argparse.Namespace, out: Path) -> None:
    from training.reproduction.variants import SWEEPS

    if arguments.table in SWEEPS:
        from training.recipe import read_recipe
        from training.reproduction.sweep import measure_table

        left = measure_table(
            arguments.table,
            read_recipe(arguments.recipe),
            arguments.work,
            out,
            seeds=tuple(arguments.seeds) if arguments.seeds else None,
            limit=arguments.limit,
        )
        if left:
            print(f"{left} rows are left: run the same command again")
    elif arguments.table == 3:
        from training.reproduction.storage import measure_storage_table, write_storage_table

        write_storage_table(measure_storage_table(_load_bundles()), out)


def _draw(arguments: argparse.Namespace, out: Path) -> None:
    from training.recipe import read_recipe
    from training.reproduction.figures import draw_methods, draw_ranks, draw_shipped_task_vectors
    from training.reproduction.workspace import Workspace

    if arguments.figure == 2:
        draw_shipped_task_vectors(_load_bundles(), out)
        return
    draw = draw_methods if arguments.figure == 4 else draw_ranks
    draw(read_recipe(arguments.recipe), Workspace(arguments.work), out)


def _load_bundles() -> "dict[str, tuple[Bundle, TaskEncoder]]":
    from service.synthesis.bundle import read_bundle
    from service.synthesis.task_encoder import build_task_encoder
    from training.shipped import BUNDLES_DIR, SUITES

    loaded = {}
    for name in SUITES.values():
        bundle = read_bundle(BUNDLES_DIR / name)
        loaded[name] = (bundle, build_task_encoder(bundle.encoder_spec))
    return loaded


def _check(paper: Path) -> int:
    from training.reproduction.check import check_committed, check_live, render_verdicts

    verdicts = [*check_committed(paper=paper), *check_live()]
    print(render_verdicts(verdicts))
    missed = sum(verdict.passed is False for verdict in verdicts)
    unmeasured = sum(verdict.passed is None for verdict in verdicts)
    print(f"check: {missed} targets missed, {unmeasured} not measured yet, of {len(verdicts)}")
    return 1 if missed else 0
