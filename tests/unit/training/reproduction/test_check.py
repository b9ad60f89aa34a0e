"""`reproduce --check`: targets are read off committed results, samples within a tolerance."""

from pathlib import Path

import pytest

from tests.fixtures.tiny_reproduction import HEAD, make_row
from training.cli import main
from training.reproduction import check
from training.reproduction.check import (
    AP50_TOLERANCE,
    Verdict,
    check_committed,
    judge,
    render_verdicts,
)
from training.reproduction.remeasure import Remeasured
from training.reproduction.row_store import RowStore
from training.reproduction.variants import RANKS


def test_committed_results_meet_the_targets_of_seen_tasks(tmp_path: Path) -> None:
    verdicts = check_committed(paper=tmp_path)

    judged = {v.name: v.passed for v in verdicts if v.name.startswith(("table 1", "table 2"))}
    assert judged.pop("table 2: ahead of COND P-DIFF (re-implemented) on the mean") is False
    assert judged.pop("table 2: generated within the own adapter's seed interval")
    assert judged.pop("table 1: generated within the own adapter's seed interval") is None
    assert [*judged.values()] == [True] * 6
    unmeasured = [v.name for v in verdicts if v.passed is None and v.name.startswith("table 4")]
    assert unmeasured == [
        *(f"table 4, rank {rank}: generated like own" for rank in RANKS),
        *(
            f"table 4, rank {rank}: generated within the own adapter's seed interval"
            for rank in RANKS
        ),
    ]


def test_ranks_are_judged_where_they_are_measured(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 4, HEAD)
    for row in (
        make_row("own", 0.5, 0.5),
        make_row("soup", 0.1, 0.2),
        make_row("cond_p_diff", 0.6, 0.7),
        make_row("token", 0.5, 0.4),
    ):
        store.append(row)

    verdicts = [v for v in check_committed(paper=tmp_path) if v.name.startswith("table 4, rank 4")]

    assert [v.passed for v in verdicts] == [False, True, False, None]
    assert verdicts[0].measured == "1 of 2 categories"


@pytest.mark.parametrize(
    ("suite", "live", "committed", "passed"),
    [
        ("detection", 0.5, 0.5 + AP50_TOLERANCE * 0.9, True),
        ("detection", 0.5, 0.5 + AP50_TOLERANCE * 1.1, False),
        ("text", 50.4, 50.0, True),
        ("text", 51.0, 50.0, False),
    ],
)
def test_a_sample_may_differ_by_the_tolerance(
    suite: str, live: float, committed: float, passed: bool
) -> None:
    assert judge(Remeasured("task", live, committed), suite).passed is passed


def test_the_exit_code_tells_of_a_missed_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed = Verdict("a target", "1", "0", passed=True)
    monkeypatch.setattr(check, "check_committed", lambda paper: [committed])
    for passed, code in ((True, 0), (None, 0), (False, 1)):
        verdict = Verdict("a target", "0.5", "0.4", passed)
        monkeypatch.setattr(check, "check_live", lambda verdict=verdict: [verdict])
        assert main(["reproduce", "--check", "--out", str(tmp_path)]) == code
    assert "1 targets missed" in capsys.readouterr().out


def test_a_missed_target_of_committed_results_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = Verdict("a target", "0", "1", passed=False)
    monkeypatch.setattr(check, "check_committed", lambda paper: [missed])
    monkeypatch.setattr(check, "check_live", list)
    assert main(["reproduce", "--check", "--out", str(tmp_path)]) == 1


def test_verdicts_are_lines_of_one_width() -> None:
    lines = render_verdicts(
        [Verdict("a", "0.5", "x", True), Verdict("longer", "-", "x", None)]
    ).splitlines()

    assert [line.index("x") for line in lines] == [lines[0].index("x")] * 2
    assert lines[0].startswith("ok ")
    assert lines[1].startswith("not measured")


def test_a_document_goes_beside_results_of_ones_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "--table", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "| category | base |" in printed
    assert "Table 2: text by domain" in (tmp_path / "RESULTS.md").read_text()
    assert main(["reproduce", "--table", "4", "--limit", "0", "--out", str(tmp_path)]) == 1
