"""Unseen tasks in RESULTS.md and `--check`: from the committed JSON, losses included."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from training.evaluation.headroom import MeanShare
from training.evaluation.outcomes import Outcomes
from training.evaluation.statistics import Interval
from training.evaluation.unseen_shares import MethodShare
from training.reproduction.check import check_committed
from training.reproduction.document import render_document
from training.reproduction.unseen_results import UNSEEN_DIRS, list_unseen_losses, read_unseen
from training.shipped import RESULTS_DIR, SUITES


def make_share(name: str, share: float, behind: float | None, gibberish: float) -> MethodShare:
    def mean(value: float) -> MeanShare:
        return MeanShare(Interval(value, value - 0.1, value + 0.1), 2, ("c",))

    return MethodShare(
        name,
        3.0 - share,
        mean(share),
        {"a": share + 0.2, "b": share - 0.2, "c": None},
        mean(gibberish),
        None if behind is None else Interval(behind, behind - 0.05, behind + 0.05),
        None if behind is None else Outcomes(1, 1, 1),
        None if behind is None else Interval(behind + 0.1, behind + 0.05, behind + 0.15),
    )


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for folder in UNSEEN_DIRS.values():
        shares = [
            make_share("in_context", 0.6, None, 0.3),
            make_share("soup", 0.4, 0.2, 0.4),
            make_share("nearest", 0.62, -0.02, 0.1),
        ]
        body = {
            "settings": {"seeds": [0], "num_folds": 5, "num_windows": 8},
            "recipe": {"bundle": {"name": "tiny"}, "finetune": {"seeds": [0, 1]}},
            "recipe_digest": "d" * 64,
            "commit": "abc1234",
            "hardware": {"processor": "CPU", "cores": 2, "accelerator": "none", "torch": "2"},
            "families": {"a": "x", "b": "y", "c": "y"},
            "unit": "nats a token",
            "base": 3.0,
            "own": 2.0,
            "results": [asdict(share) for share in shares],
        }
        path = tmp_path / folder / "unseen.json"
        path.parent.mkdir()
        path.write_text(json.dumps(body))
    for name in SUITES.values():  # what else is checked
        (tmp_path / name).mkdir(exist_ok=True)
        content = (RESULTS_DIR / name / "evaluation.json").read_text()
        (tmp_path / name / "evaluation.json").write_text(content)
    return tmp_path


def test_targets_are_judged(results: Path) -> None:
    verdicts = {v.name: v for v in check_committed(results, results) if "unseen" in v.name}
    assert {name: v.passed for name, v in verdicts.items()} == {
        "unseen text: share of headroom by words": True,
        "unseen text: significantly ahead, share of headroom": False,
        "unseen text: significantly ahead, nats a token": True,
        "unseen text: gibberish below the truth on the mean": True,
        "unseen detection: significantly ahead, share of headroom": False,
        "unseen detection: significantly ahead, nats a token": True,
        "unseen detection: gibberish below the truth on the mean": True,
    }
    assert (
        verdicts["unseen text: significantly ahead, share of headroom"].measured
        == "of 1 of 2 methods"
    )


def test_a_method_that_is_shown_examples_has_a_target_of_its_own(results: Path) -> None:
    path = results / UNSEEN_DIRS["text"] / "unseen.json"
    body = json.loads(path.read_text())
    body["results"].append(asdict(make_share("in_context+examples", 0.8, -0.2, 0.7)))
    path.write_text(json.dumps(body))
    verdicts = {v.name: v for v in check_committed(results, results)}
    shown = verdicts["unseen text: share of headroom with eight examples"]
    assert (shown.passed, shown.measured) == (True, "0.800 (`in_context+examples`)")
    assert (
        verdicts["unseen text: significantly ahead, share of headroom"].measured
        == "of 1 of 2 methods"
    )


def test_margins_are_counted(results: Path) -> None:
    path = results / UNSEEN_DIRS["text"] / "unseen.json"
    body = json.loads(path.read_text())
    body["results"][0]["margins"] = {"a": 0.1, "b": -0.1}
    path.write_text(json.dumps(body))
    verdicts = {v.name: v for v in check_committed(results, results)}
    steered = verdicts["unseen text: steering margin above 0"]
    assert (steered.passed, steered.measured) == (False, "on 1 of 2 tasks")


@pytest.mark.parametrize(
    ("judged", "other", "lacks"),
    [
        ("in_context_functional", "in_context_contrastive", "nothing; contrast is added"),
        ("in_context_contrastive", "in_context_functional", "contrast"),
    ],
)
def test_ablations_are_of_the_judged_method_behind_the_same_prompt(
    results: Path, judged: str, other: str, lacks: str
) -> None:
    path = results / UNSEEN_DIRS["text"] / "unseen.json"
    body = json.loads(path.read_text())
    body["results"] = [
        asdict(make_share(f"{judged}+description", 0.8, None, 0.3)),
        asdict(make_share(f"{other}+description", 0.8, 0.0, 0.3)),
        asdict(make_share("in_context+description", 0.7, 0.1, 0.3)),
        asdict(make_share(judged, 0.6, 0.2, 0.3)),
        asdict(make_share("in_context", 0.5, 0.3, 0.3)),
        asdict(make_share("description", 0.4, 0.4, 0.3)),
    ]
    path.write_text(json.dumps(body))
    text = render_document(results, results, results)
    table = text.partition("What each ingredient is worth:")[2].strip().split("\n\n")[0]
    assert table.splitlines()[2:] == [
        f"| {lacks} | `{other}+description` | 0.800 | 0.000 (-0.050 to 0.050) |",
        "| training through the base | `in_context+description` | 0.700 | 0.100 (0.050 to 0.150) |",
        f"| the description before the text | `{judged}` | 0.600 | 0.200 (0.150 to 0.250) |",
        "| an adapter | `description` | 0.400 | 0.400 (0.350 to 0.450) |",
    ]
    assert text.count("What each ingredient is worth:") == 1  # of the other suite nothing is judged
    verdicts = {v.name: v for v in check_committed(results, results)}
    assert (
        verdicts["unseen text: significantly ahead, share of headroom"].measured
        == "of 1 of 1 methods"
    )


def test_losses_name_who_is_ahead(results: Path) -> None:
    found = read_unseen("text", results)
    assert found is not None
    assert [*list_unseen_losses(found.results)] == [
        "`in_context` has no clear lead over `nearest`.",
        "Without headroom, and so not in the means: c.",
    ]
    ahead = [make_share("token", 0.5, None, 0.1), make_share("examples", 0.9, -0.4, 0.1)]
    assert next(iter(list_unseen_losses(ahead))) == (
        "`examples` is clearly ahead: 0.900 against 0.500 of `token`."
    )
    below = [make_share("token", -0.1, None, -0.2)]
    assert next(iter(list_unseen_losses(below))) == (
        "`token` is worse than the base alone on the mean."
    )
    worse = [make_share("token", 0.1, None, 0.1)]
    assert [*list_unseen_losses(worse)][:2] == [
        "`token` does as well with gibberish as with the description.",
        "`token` is worse than the base alone on: b.",
    ]


def test_the_document_has_a_section_of_each_suite(results: Path, tmp_path: Path) -> None:
    text = render_document(results, results, results)
    assert "3 tasks in 2 families, fine-tuning seeds 0, 1, seeds of the methods 0;" in text
    row = "| nearest | 2.380 | 0.080 (0.030 to 0.130) | 0.620 (0.520 to 0.720) |"
    assert text.count(row) == 2
    assert "nats a token: mean over all tasks, of the base 3.000, of own adapters 2.000." in text
    (results / UNSEEN_DIRS["text"] / "unseen.json").unlink()
    assert "Not measured yet: `icm-lora unseen`" in render_document(results, results, results)
