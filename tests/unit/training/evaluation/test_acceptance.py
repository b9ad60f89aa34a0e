"""Accept rates: the committed ones are of the shipped bundles and keep their promise."""

import json
from pathlib import Path

import pytest

from service.synthesis.bundle import read_bundle
from service.synthesis.novelty import THRESHOLD
from tests.fixtures.tiny_bundle import TinyBundle
from training.evaluation.acceptance import (
    FRAGMENTS,
    WORDINGS,
    list_unseen_families,
    measure_acceptance,
    read_wordings,
    render_table,
)


@pytest.mark.parametrize("name", WORDINGS)
def test_committed_rates_are_of_this_bundle_and_good_enough(name: str) -> None:
    document = json.loads(Path(f"training/results/{name}/acceptance.json").read_text())
    bundle = read_bundle(Path("service/bundles") / name)
    assert document["bundle"]["digest"] == bundle.digest
    assert document["threshold"] == THRESHOLD
    for kind in document["kinds"]:
        rate = kind["accepted"] / kind["count"]
        if kind["wanted"] is True:
            assert rate >= 0.95, kind
        elif kind["wanted"] is False:
            assert rate <= 0.25, kind
        if kind["min_auroc"] is not None:
            assert kind["auroc"] >= kind["min_auroc"], kind


def test_every_kind_is_measured(tiny_bundle: TinyBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.evaluation.acceptance.COUNT", 3)
    results = measure_acceptance(tiny_bundle.synthesizer, "text-smollm2")
    assert [each.count for each in results[3:]] == [3, 3, len(FRAGMENTS), 3]
    assert [each.auroc is None for each in results] == [True] + 6 * [False]
    assert results[0].count == len(read_wordings("text_domains.toml"))
    left = list_unseen_families([])
    assert {table["family"] for table in left.values()} == {
        "dictionaries",
        "manuals",
        "sayings",
        "scripture",
    }
    assert results[2].example == next(iter(left.values()))["heldout_descriptions"][0]
    table = render_table(tiny_bundle.synthesizer, results)
    assert table.count("\n") == 4 + len(results)
