"""Memorisation audit: against search over dense updates, and scikit-learn's Jaccard index."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from service.errors import InvalidInputError
from service.synthesis.layout import AdapterKind
from tests.fixtures.kernel import PROPERTY, adapt_tiny_net, normal
from tests.unit.training.evaluation.test_updates import build_dense
from training.evaluation import memorisation
from training.evaluation.memorisation import find_nearest_checkpoint, measure_iou


@pytest.mark.parametrize("kind", AdapterKind)
def test_the_nearest_checkpoint_is_that_of_the_dense_updates(
    kind: AdapterKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memorisation, "BATCH_CHECKPOINTS", 3)
    _, layout, bases = adapt_tiny_net(kind)
    checkpoints = {f"task{i}": normal(7, layout.num_params, seed=i) for i in range(3)}
    vector = normal(layout.num_params, seed=9)

    def flatten(row: torch.Tensor) -> torch.Tensor:
        return torch.cat([part.flatten() for part in build_dense(bases, row).values()])

    ours = flatten(vector)
    expected = min(
        (float((flatten(row) - ours).norm()), task, index)
        for task, rows in checkpoints.items()
        for index, row in enumerate(rows)
    )
    nearest = find_nearest_checkpoint(bases, vector, checkpoints)

    assert (nearest.task, nearest.index) == expected[1:]
    assert nearest.distance == pytest.approx(expected[0], rel=1e-5)
    assert nearest.relative == pytest.approx(expected[0] / float(ours.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", AdapterKind)
def test_a_copy_is_found(kind: AdapterKind) -> None:
    _, layout, bases = adapt_tiny_net(kind)
    checkpoints = {f"task{i}": normal(5, layout.num_params, seed=i).half() for i in range(3)}
    nearest = find_nearest_checkpoint(bases, checkpoints["task1"][3], checkpoints)

    assert (nearest.task, nearest.index) == ("task1", 3)
    assert nearest.relative < 1e-14
    with pytest.raises(InvalidInputError, match="no training checkpoints"):
        find_nearest_checkpoint(bases, checkpoints["task1"][3], {})


BITS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20)


@PROPERTY
@given(BITS)
def test_iou_is_scikit_learns_jaccard_score(bits: list[tuple[bool, bool]]) -> None:
    first, second = (list(side) for side in zip(*bits, strict=True))
    expected = jaccard_score(first, second, zero_division=1.0)
    assert measure_iou(torch.tensor(first), torch.tensor(second)) == pytest.approx(expected)
