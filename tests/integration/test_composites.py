"""The real cut-outs and backgrounds: fetched from the registry, no instance in two splits."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from training.tasks.cache import default_cache_dir
from training.tasks.composites import (
    WIDE_WORDINGS_FILE,
    WORDINGS_FILE,
    read_base_tasks,
    read_categories,
)
from training.tasks.cutouts import (
    BACKGROUND_PIXELS,
    CUTOUT_PIXELS,
    DISTRACTOR,
    PARTS,
    Background,
    Cutout,
    load_cutouts,
)
from training.tasks.scenes import SceneComposer
from training.tasks.text_task import read_wordings

pytestmark = [pytest.mark.network, pytest.mark.slow, pytest.mark.timeout(1200)]

MIN_TASKS = 14


@pytest.fixture(scope="module")
def pictures() -> tuple[tuple[Cutout, ...], tuple[Background, ...]]:
    return load_cutouts(default_cache_dir(), lambda _line: None)


@pytest.fixture(scope="module")
def cutouts(pictures: tuple[tuple[Cutout, ...], tuple[Background, ...]]) -> tuple[Cutout, ...]:
    return pictures[0]


@pytest.fixture(scope="module")
def backgrounds(
    pictures: tuple[tuple[Cutout, ...], tuple[Background, ...]],
) -> tuple[Background, ...]:
    return pictures[1]


def key(pixels: Tensor) -> bytes:
    return bytes(pixels.numpy().tobytes())


def test_every_category_has_instances_in_every_split(cutouts: tuple[Cutout, ...]) -> None:
    counts = Counter((cutout.category, cutout.part) for cutout in cutouts)

    assert len(read_categories()) >= MIN_TASKS
    for category in (*read_categories(), DISTRACTOR):
        assert all(counts[category, part] for part in PARTS), category
        assert counts[category, "train"] > counts[category, "test"] / 2


def test_no_instance_is_in_two_splits(cutouts: tuple[Cutout, ...]) -> None:
    assert len({cutout.name for cutout in cutouts}) == len(cutouts)
    parts: dict[tuple[str, bytes], set[str]] = {}
    for cutout in cutouts:  # the same picture under two names
        parts.setdefault((cutout.category, key(cutout.pixels)), set()).add(cutout.part)

    assert all(len(found) == 1 for found in parts.values())


def test_backgrounds_are_of_one_split(backgrounds: tuple[Background, ...]) -> None:
    assert {background.part for background in backgrounds} == set(PARTS)
    assert len({background.name for background in backgrounds}) == len(backgrounds)
    parts: dict[bytes, set[str]] = {}
    for background in backgrounds:  # the same picture under two names
        parts.setdefault(key(background.pixels), set()).add(background.part)
    assert all(len(found) == 1 for found in parts.values())
    assert all(min(b.pixels.shape[1:]) == BACKGROUND_PIXELS for b in backgrounds)


def test_cutouts_are_cropped_and_small(cutouts: tuple[Cutout, ...]) -> None:
    for cutout in cutouts:
        assert max(cutout.pixels.shape[1:]) <= CUTOUT_PIXELS
        alpha = cutout.pixels[3]
        for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert edge.any(), cutout.name


def test_every_category_is_worded() -> None:
    narrow, wide = read_wordings(WORDINGS_FILE), read_wordings(WIDE_WORDINGS_FILE)
    wordings = {**narrow, **wide}
    base_tasks, all_wordings = read_base_tasks()

    assert list(narrow) == list(read_categories())
    assert list(wordings) == list(read_categories(wide=True))
    told = [w for each in wordings.values() for w in each.descriptions + each.heldout_descriptions]
    assert len(set(told)) == len(told)
    assert all(
        len(w.descriptions) >= 8 and len(w.heldout_descriptions) >= 3 for w in wordings.values()
    )
    assert 0 < len(base_tasks) < len(narrow)
    assert len(set(all_wordings)) == len(all_wordings)


def test_wide_categories_are_among_the_distractors_and_keep_their_splits(
    cutouts: tuple[Cutout, ...],
) -> None:
    wide, _ = load_cutouts(default_cache_dir(), wide=True)
    further = read_categories(wide=True).keys() - read_categories().keys()
    before = {cutout.name: cutout for cutout in cutouts}
    counts = Counter((cutout.category, cutout.part) for cutout in wide)

    assert len(read_categories(wide=True)) >= 40
    assert not any(read_categories(wide=True)[name] for name in further)
    for category in further:
        assert min(counts[category, "train"], counts[category, "test"]) >= 2, category
    for cutout in wide:
        expected = DISTRACTOR if cutout.category in further else cutout.category
        assert (before[cutout.name].category, before[cutout.name].part) == (expected, cutout.part)


def test_scenes_can_be_composed_of_every_split(
    cutouts: tuple[Cutout, ...], backgrounds: tuple[Background, ...]
) -> None:
    owner = {cutout.name: cutout for cutout in cutouts}
    for part in PARTS:
        composer = SceneComposer(cutouts, backgrounds, part, tuple(read_categories()))
        scenes = [composer.compose(i) for i in range(10)]
        assert torch.equal(composer.compose(3).pixels, scenes[3].pixels)
        for found in (each for scene in scenes for each in scene.objects):
            assert owner[found.instance].part == part
            assert owner[found.instance].category == found.category
