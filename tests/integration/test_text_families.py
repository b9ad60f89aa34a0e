"""The families' real texts: large enough, and no held-out text in any task's training text.

Two small tasks are checked in every run. All of them take minutes, `pytest -m survey` does it.
"""

from collections.abc import Sequence

import pytest

from training.tasks import TextTask, load_text_tasks
from training.tasks.documents import MAX_TEST_CHARS, MAX_TRAIN_CHARS
from training.tasks.family_texts import FAMILY_TEXTS
from training.tasks.leakage import LEAKAGE_LIMIT, cut_windows, find_leaks, measure_leakage
from training.tasks.text_families import MIN_TEST_CHARS, MIN_TRAIN_CHARS

pytestmark = pytest.mark.network

QUICK_TASKS = ("recipes_danish", "dictionary_devil")


def check_texts(tasks: Sequence[TextTask]) -> None:
    """Check sizes, and leaks between each task's held-out text and all tasks' training text."""
    train = [passage for task in tasks for passage in task.train]
    windows = {task.name: [w for p in task.test for w in cut_windows(p)] for task in tasks}
    found = find_leaks(train, {window for name in windows for window in windows[name]})
    print(f"\n{'task':<24}{'family':<14}{'train':>11}{'test':>10}{'leakage':>9}{'of all':>9}")
    failures = []
    for task in tasks:
        num_train, num_test = sum(map(len, task.train)), sum(map(len, task.test))
        own = measure_leakage(task.train, task.test)
        of_all = sum(window in found for window in windows[task.name]) / len(windows[task.name])
        print(
            f"{task.name:<24}{task.family:<14}{num_train:>11,}{num_test:>10,}{own:>9.3%}{of_all:>9.3%}"
        )
        fits = MIN_TRAIN_CHARS <= num_train <= MAX_TRAIN_CHARS
        fits &= MIN_TEST_CHARS <= num_test <= MAX_TEST_CHARS
        if not fits or max(own, of_all) >= LEAKAGE_LIMIT:
            failures.append(task.name)
    assert failures == []


def test_two_small_tasks_are_large_enough_and_do_not_leak() -> None:
    check_texts(load_text_tasks("families", QUICK_TASKS))


@pytest.mark.slow
@pytest.mark.survey
@pytest.mark.timeout(1800)
def test_all_tasks_are_large_enough_and_do_not_leak_into_each_other() -> None:
    tasks = load_text_tasks("families")
    assert len(tasks) == len(FAMILY_TEXTS)
    check_texts(tasks)
