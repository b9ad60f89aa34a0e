"""Boxes as tokens, and their loss: against torch's cross-entropy, and by its properties."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.inference.embedded_detector import NUM_BINS
from tests.fixtures.kernel import normal
from training.box_objective import (
    IGNORED,
    BoxVocabulary,
    SmoothedBoxLoss,
    bin_of,
    build_box_batch,
)

FIRST = 7
SIZE = FIRST + NUM_BINS + 3
"""Three tokens, such as names', follow the location tokens."""

PLAIN = BoxVocabulary(
    first_location=FIRST,
    bos_id=0,
    eos_id=2,
    pad_id=1,
    image_id=3,
    image_tokens=4,
    writes_labels=False,
)
LABELLED = BoxVocabulary(FIRST, 0, 2, 1, 3, 4, writes_labels=True)
EOS = PLAIN.eos_id


def tokens(*bins: int) -> list[int]:
    return [FIRST + number for number in bins]


LABELS = torch.tensor(
    [
        [*tokens(100, 200, 300, 999), EOS],
        [EOS, *[IGNORED] * 4],
        [FIRST + NUM_BINS + 1, *tokens(0, 5), EOS, IGNORED],
    ]
)


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of the mean over a row's tokens."""
    rows = [
        functional.cross_entropy(row, wanted, ignore_index=IGNORED)
        for row, wanted in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows).mean()


def test_without_smoothing_it_is_cross_entropy() -> None:
    logits = normal(3, 5, SIZE)
    measured = SmoothedBoxLoss(PLAIN, 0.0)(logits, LABELS)

    torch.testing.assert_close(measured, reference(logits, LABELS))


def test_without_smoothing_its_gradient_is_that_of_cross_entropy() -> None:
    mine, theirs = (normal(3, 5, SIZE).requires_grad_() for _ in range(2))
    SmoothedBoxLoss(PLAIN, 0.0)(mine, LABELS).backward()
    reference(theirs, LABELS).backward()

    torch.testing.assert_close(mine.grad, theirs.grad)


def test_smoothing_is_a_gaussian_over_bins() -> None:
    std = 5.0
    logits = normal(1, 1, SIZE)
    distance = torch.arange(NUM_BINS).float() - 400
    weights = torch.exp(-0.5 * (distance / std).square())
    target = torch.zeros(SIZE)
    target[FIRST : FIRST + NUM_BINS] = weights / weights.sum()
    measured = SmoothedBoxLoss(PLAIN, std)(logits, torch.tensor([tokens(400)]))

    torch.testing.assert_close(measured, functional.cross_entropy(logits[0], target[None]))


def test_the_gradient_pulls_near_bins_up_and_all_else_down() -> None:
    logits = torch.zeros(1, 2, SIZE, requires_grad=True)
    SmoothedBoxLoss(PLAIN, 8.0)(logits, torch.tensor([[*tokens(500), EOS]])).backward()
    assert logits.grad is not None
    location, end = -logits.grad[0]

    assert (location[FIRST + 490 : FIRST + 511] > 0).all()
    assert int(location.argmax()) == FIRST + 500
    assert (location[FIRST : FIRST + 450] < 0).all()
    assert location[EOS] < 0, "a box goes on"
    assert end[EOS] > 0
    assert (end[FIRST:] < 0).all()


def test_padding_has_no_part_in_it() -> None:
    loss = SmoothedBoxLoss(PLAIN, 8.0)
    logits = normal(3, 5, SIZE).requires_grad_()
    longer = torch.cat([logits, normal(3, 2, SIZE, seed=1)], dim=1)
    padded = functional.pad(LABELS, (0, 2), value=IGNORED)

    torch.testing.assert_close(loss(longer, padded), loss(logits, LABELS))
    loss(logits, LABELS).backward()
    assert logits.grad is not None
    assert not logits.grad[LABELS == IGNORED].any()
    assert logits.grad[LABELS != IGNORED].any(dim=-1).all()


def test_rows_weigh_the_same_whatever_their_length() -> None:
    loss = SmoothedBoxLoss(PLAIN, 8.0)
    logits = normal(3, 5, SIZE)
    alone = [loss(logits[i : i + 1], LABELS[i : i + 1]) for i in range(3)]

    torch.testing.assert_close(loss(logits, LABELS), torch.stack(alone).mean())


def test_the_loss_is_low_where_the_answer_is_right() -> None:
    logits = torch.full((1, 2, SIZE), -20.0)
    logits[0, 0, FIRST + 300], logits[0, 1, EOS] = 20.0, 20.0
    right, wrong = torch.tensor([[*tokens(300), EOS]]), torch.tensor([[*tokens(302), EOS]])
    sharp, soft = SmoothedBoxLoss(PLAIN, 0.0), SmoothedBoxLoss(PLAIN, 8.0)

    assert sharp(logits, right) < 1e-6 < sharp(logits, wrong)
    uniform = torch.zeros(1, 2, SIZE)
    assert soft(uniform, right).item() == pytest.approx(math.log(SIZE))


@pytest.mark.parametrize(
    ("fraction", "number"),
    [
        (0.0, 0),
        (0.0009, 0),
        (0.0011, 1),
        (0.5, 500),
        (0.9999, 999),
        (1.0, 999),
        (-0.1, 0),
        (2.0, 999),
    ],
)
def test_bins_are_floors_within_the_image(fraction: float, number: int) -> None:
    assert bin_of(fraction) == number


def test_boxes_are_written_from_left_to_right() -> None:
    left, right = (0.1, 0.5, 0.3, 0.9), (0.5, 0.1, 0.9, 0.2)
    wide = (0.0, 0.0, 0.9, 1.0)  # its centre lies between theirs
    batch = build_box_batch(PLAIN, [[9], [9, 9]], [[right, wide, left], []])
    answer = [100, 500, 300, 900, 0, 0, 900, 999, 500, 100, 900, 200]

    assert batch.labels[0].tolist() == [*tokens(*answer), EOS]
    assert batch.labels[1].tolist() == [EOS, *[IGNORED] * 12]


def test_prompts_follow_the_image_tokens() -> None:
    batch = build_box_batch(PLAIN, [[9], [9, 8]], [[], []])

    assert batch.input_ids.tolist() == [[3, 3, 3, 3, 0, 9, 2, 1], [3, 3, 3, 3, 0, 9, 8, 2]]
    assert batch.attention_mask.tolist() == [[1] * 7 + [0], [1] * 8]


def test_florence2_writes_the_name_before_every_box() -> None:
    box, other = (0.1, 0.1, 0.2, 0.2), (0.3, 0.3, 0.4, 0.4)
    batch = build_box_batch(LABELLED, [[9], [9]], [[box, other], []], label=[5, 6])
    first, second = tokens(100, 100, 200, 200), tokens(300, 300, 400, 400)

    assert batch.labels[0].tolist() == [0, 5, 6, *first, 5, 6, *second, EOS]
    assert batch.labels[1, :2].tolist() == [0, EOS]
