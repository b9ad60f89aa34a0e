"""Leave-one-out splits of tasks, by family.

A task is unseen only if nothing that resembles it by descent was trained on: the three Wikipedias
of one archive, two genres of one corpus, two books of one author. So tasks that share data are one
family, and a family leaves as a whole: its tasks, with all of their checkpoints and wordings.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from service.errors import InvalidInputError
from training.tasks.text_task import normalize_wording


@dataclass(frozen=True)
class Fold:
    """One family left out.

    Attributes:
        family: that is left out.
        test: its tasks; each is measured as an unseen task.
        validation: tasks of the families that this fold's choices are made on.
        train: tasks that the generator is trained on.
    """

    family: str
    test: tuple[str, ...]
    validation: tuple[str, ...]
    train: tuple[str, ...]


def group_families(origins: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Family of each task: tasks that share an origin, directly or through others, are one.

    Args:
        origins: what each task descends from: archives, authors, a family that is stated. A task
            of none is a family by itself.

    Returns:
        For each task the name of its family: the first of its tasks by alphabet.
    """
    parent = {task: task for task in origins}

    def find_root(task: str) -> str:
        while parent[task] != task:
            task = parent[task]
        return task

    first_of: dict[str, str] = {}
    for task in sorted(origins):
        for origin in origins[task]:
            roots = sorted((find_root(task), find_root(first_of.setdefault(origin, task))))
            parent[roots[1]] = roots[0]
    return {task: find_root(task) for task in origins}


def leave_families_out(
    families: Mapping[str, str], *, num_validation: int = 1, seed: int = 0
) -> tuple[Fold, ...]:
    """One fold a family, in the order of their names.

    Validation families are those of the smallest sha256 of seed and name, without the one that is
    left out: a family more or less changes little, and folds differ as little as they can. A
    choice made on them holds for their fold alone, because each is a test family elsewhere.

    Args:
        families: family of each task.
        num_validation: families to make choices on.
        seed: of the choice of validation families.

    Raises:
        InvalidInputError: no family would be left to train on.
    """
    names = sorted(set(families.values()))
    if num_validation < 0 or len(names) < num_validation + 2:
        raise InvalidInputError(
            f"{len(names)} families do not suffice for one to test, {num_validation} to validate "
            "and one to train"
        )
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())

    def list_tasks(chosen: Collection[str]) -> tuple[str, ...]:
        return tuple(task for task, family in families.items() if family in chosen)

    folds = []
    for left_out in names:
        validation = [name for name in ranked if name != left_out][:num_validation]
        train = set(names) - {left_out, *validation}
        folds.append(
            Fold(left_out, list_tasks([left_out]), list_tasks(validation), list_tasks(train))
        )
    return tuple(folds)


def find_fold(folds: Collection[Fold], task: str) -> Fold:
    """The fold that measures a task.

    Raises:
        InvalidInputError: none does.
    """
    for fold in folds:
        if task in fold.test:
            return fold
    raise InvalidInputError(f"no fold leaves the task {task!r} out")


def check_fold(
    fold: Fold, families: Mapping[str, str], wordings: Mapping[str, Collection[str]]
) -> None:
    """Refuses a fold whose parts are not apart.

    Args:
        fold: to check.
        families: family of each task.
        wordings: descriptions of each task, held-out ones included.

    Raises:
        InvalidInputError: a family is in two parts, or a task that is trained on is described
            in the words of one that is not.
    """
    parts = {"test": fold.test, "validation": fold.validation, "train": fold.train}
    home: dict[str, str] = {}
    for part, tasks in parts.items():
        for task in tasks:
            if home.setdefault(families[task], part) != part:
                raise InvalidInputError(
                    f"family {families[task]!r} is in {home[families[task]]} and {part}"
                )
    seen = {normalize_wording(text): task for task in fold.train for text in wordings[task]}
    for task in (*fold.test, *fold.validation):
        for text in wordings[task]:
            if owner := seen.get(normalize_wording(text)):
                raise InvalidInputError(f"{text!r} describes {task!r} and {owner!r}, trained on")
