"""Generated adapters are judged by the spread of own ones over fine-tuning seeds."""

import json
import shutil
from pathlib import Path

import pytest

from tests.fixtures.tiny_reproduction import HEAD, make_row
from training.checkpoint import write_text
from training.evaluation.finetune_seeds import RESULT_NAME
from training.evaluation.outcomes import Outcome
from training.reproduction.check import check_committed
from training.reproduction.document import render_document
from training.reproduction.row_store import RowStore
from training.reproduction.seed_noise import read_rank_noise, read_text_gaps, read_text_noise
from training.shipped import RESULTS_DIR, SUITES


def make_own(seed: int, *ap50: float) -> dict[str, object]:
    label = {"rank": 4, "fine-tuning seed": seed}
    return make_row("own", *ap50, label=label, adapters=f"again{seed}")


ROWS = (
    make_row("own", 0.50, 0.20, 0.30),
    make_own(1, 0.52, 0.20, 0.31),
    make_own(2, 0.48, 0.21, 0.29),
    make_row("token", 0.55, 0.10, 0.90),
)
"""Of three tasks; the reach of the first one's interval is 4.303 x 0.02 x sqrt(4 / 3) = 0.099."""


def test_a_score_is_judged_by_the_spread_of_own_adapters() -> None:
    noise = read_rank_noise(ROWS, rank=4)

    assert noise is not None
    assert noise.outcomes == {"task0": Outcome.TIE, "task1": Outcome.LOSS, "task2": Outcome.WIN}
    assert noise.num_inside == 2
    assert noise.own == pytest.approx((1 / 3, 1.03 / 3, 0.98 / 3))
    assert noise.reach == pytest.approx(4.303 * 0.01 * (4 / 3) ** 0.5, rel=1e-3)


def test_two_seeds_say_nothing() -> None:
    assert read_rank_noise([*ROWS[:2], ROWS[3]], rank=4) is None
    assert read_rank_noise(ROWS[:3], rank=4) is None
    assert read_rank_noise(ROWS, rank=8) is None


def test_it_is_a_target_and_a_part_of_the_document(tmp_path: Path) -> None:
    store = RowStore(tmp_path, 4, HEAD)
    for row in ROWS:
        store.append(row)

    (verdict,) = (
        v
        for v in check_committed(paper=tmp_path)
        if v.name.startswith("table 4, rank 4: generated w")
    )
    assert (verdict.measured, verdict.passed) == ("2 of 3 tasks", False)
    text = render_document(RESULTS_DIR, tmp_path, tmp_path)
    assert "| table 4, rank 4 | 0.333, 0.343, 0.327 | 0.050 | 1, 1, 1 | task1 |" in text


@pytest.mark.parametrize(
    ("shift", "expected"), [(0.0, Outcome.TIE), (0.1, Outcome.WIN), (-0.1, Outcome.LOSS)]
)
def test_texts_are_judged_by_nats_where_less_is_better(
    tmp_path: Path, shift: float, expected: Outcome
) -> None:
    other = SUITES["detection"]
    shutil.copytree(RESULTS_DIR / other, tmp_path / other)
    name = SUITES["text"]
    document = json.loads((RESULTS_DIR / name / "evaluation.json").read_text())
    own = {}
    for task in document["tasks"]:
        task["scores"]["own"]["nats_per_token"] += shift
        own[task["name"]] = task["scores"]["own"]["nats_per_token"]
    write_text(tmp_path / name / "evaluation.json", json.dumps(document))
    assert read_text_noise(tmp_path) is None

    more = {"own.1": 0.004, "own.2": -0.004, "cond_p_diff.1": 0.024}
    nats = {label: {task: own[task] + by for task in own} for label, by in more.items()}
    write_text(tmp_path / name / RESULT_NAME, json.dumps({"nats_per_token": nats}))
    noise = read_text_noise(tmp_path)
    assert noise is not None
    assert {*noise.outcomes.values()} == {expected}
    assert len(noise.own) == 3
    assert noise.own[1] == pytest.approx(noise.own[0] - 0.004)
    gaps = read_text_gaps(tmp_path)
    assert gaps["cond_p_diff"] == pytest.approx(0.02)
    assert abs(gaps["generated"] + shift) < 0.01
    (verdict,) = (
        v
        for v in check_committed(tmp_path, tmp_path)
        if v.name.startswith("table 2: ahead of COND")
    )
    assert verdict.passed is (shift >= 0)
