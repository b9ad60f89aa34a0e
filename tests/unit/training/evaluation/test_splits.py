"""Splits by family: nothing that shares data is on both sides."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import LeaveOneGroupOut

from service.errors import InvalidInputError
from tests.fixtures.kernel import PROPERTY
from training.evaluation.splits import (
    Fold,
    check_fold,
    find_fold,
    group_families,
    leave_families_out,
)
from training.tasks.text_domains import DOMAINS

ORIGINS = {
    "emma": {"janeaustenr"},
    "persuasion": {"janeaustenr"},
    "news": {"brown"},
    "fiction": {"brown", "project gutenberg"},
    "moby_dick": {"project gutenberg"},
    "python": set(),
    "recipes": {"recipes"},
}
FAMILIES = group_families(ORIGINS)


def test_tasks_that_share_an_origin_are_a_family_also_through_others() -> None:
    assert FAMILIES == {
        "emma": "emma",
        "persuasion": "emma",
        "news": "fiction",
        "fiction": "fiction",
        "moby_dick": "fiction",
        "python": "python",
        "recipes": "recipes",
    }


origins = st.dictionaries(
    st.text("abcdef", min_size=1, max_size=3),
    st.frozensets(st.integers(0, 8).map(str), max_size=3),
    max_size=12,
)


@PROPERTY
@given(origins)
def test_families_are_the_connected_components(origins: Mapping[str, frozenset[str]]) -> None:
    families = group_families(origins)

    for task in origins:  # brute force: spread from a task until nothing is added
        reached, size = {task}, 0
        while size < len(reached):
            size = len(reached)
            held = frozenset().union(*(origins[name] for name in reached))
            reached |= {name for name, own in origins.items() if own & held}
        assert {name for name in origins if families[name] == families[task]} == reached
        assert families[task] == min(reached)


@PROPERTY
@given(origins, st.integers(0, 3), st.integers(0, 99))
def test_no_family_is_on_both_sides(
    origins: Mapping[str, frozenset[str]], num_validation: int, seed: int
) -> None:
    families = group_families(origins)
    if len(set(families.values())) < num_validation + 2:
        with pytest.raises(InvalidInputError, match="do not suffice"):
            leave_families_out(families, num_validation=num_validation, seed=seed)
        return
    folds = leave_families_out(families, num_validation=num_validation, seed=seed)

    assert sorted(task for fold in folds for task in fold.test) == sorted(origins)
    for fold in folds:
        parts = (fold.test, fold.validation, fold.train)
        assert sorted(task for part in parts for task in part) == sorted(origins)
        sides = [{families[task] for task in part} for part in parts]
        assert sides[0] == {fold.family}
        assert len(sides[1]) == num_validation
        assert not sides[0] & sides[1]
        assert not (sides[0] | sides[1]) & sides[2]
        origin_sides = [frozenset().union(*(origins[task] for task in part)) for part in parts]
        assert not (origin_sides[0] | origin_sides[1]) & origin_sides[2]
        check_fold(fold, families, {task: [task] for task in origins})


def test_test_and_rest_are_those_of_scikit_learn() -> None:
    tasks = list(FAMILIES)
    groups = list(FAMILIES.values())
    reference = {
        (frozenset(tasks[i] for i in test), frozenset(tasks[i] for i in rest))
        for rest, test in LeaveOneGroupOut().split(tasks, groups=groups)
    }
    folds = leave_families_out(FAMILIES)
    assert {(frozenset(f.test), frozenset(f.validation + f.train)) for f in folds} == reference


def test_the_domains_of_one_archive_leave_together() -> None:
    families = group_families(
        {name: {each.folder_name for each in domain.archives} for name, domain in DOMAINS.items()}
    )
    folds = leave_families_out(families, num_validation=2)
    fold = find_fold(folds, "wikipedia_fr")

    assert {"wikipedia_en", "wikipedia_fr", "wikipedia_es"} <= set(fold.test)
    assert find_fold(folds, "wikipedia_en") is fold
    assert {"brown_fiction", "brown_news"} <= set(find_fold(folds, "brown_news").test)
    with pytest.raises(InvalidInputError, match="no fold leaves the task 'latin' out"):
        find_fold(folds, "latin")


def test_validation_follows_from_the_seed_and_hardly_from_the_other_families() -> None:
    many = {f"task{i}": f"family{i}" for i in range(20)}
    folds = leave_families_out(many, num_validation=3, seed=1)

    assert leave_families_out(many, num_validation=3, seed=1) == folds
    assert leave_families_out(many, num_validation=3, seed=2) != folds
    choices = {fold.validation for fold in folds}
    assert len(choices) == 4  # one for all, but where a family of it is left out itself
    fewer = {task: family for task, family in many.items() if family not in folds[0].family}
    shared = set(leave_families_out(fewer, num_validation=3, seed=1)[-1].validation)
    assert len(shared & set(folds[-1].validation)) >= 2


def test_a_fold_that_leaks_is_refused() -> None:
    wordings = {task: [f"Write {task}."] for task in FAMILIES}
    leaky = Fold("emma", test=("emma",), validation=("recipes",), train=("persuasion", "python"))
    with pytest.raises(InvalidInputError, match="'emma' is in test and train"):
        check_fold(leaky, FAMILIES, wordings)

    fold = Fold("emma", ("emma", "persuasion"), ("recipes",), ("news", "fiction", "moby_dick"))
    check_fold(fold, FAMILIES, wordings)
    with pytest.raises(InvalidInputError, match="describes 'emma' and 'news'"):
        check_fold(fold, FAMILIES, wordings | {"news": ["write: EMMA"]})
