"""The families: complete and disjoint definitions, and the loader on a small archive."""

from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from service.errors import InvalidInputError, InvalidTaskDataError
from training.evaluation.splits import group_families
from training.recipe import read_recipe
from training.tasks import family_texts, load_text_tasks, text_families
from training.tasks.documents import Document, hold_out_units
from training.tasks.family_texts import FAMILY_TEXTS
from training.tasks.prepared_texts import Corpus, prepared_path
from training.tasks.text_domains import DOMAINS
from training.tasks.text_families import (
    MIN_TEST_CHARS,
    MIN_TRAIN_CHARS,
    prepare_families,
    read_families,
)
from training.tasks.text_task import normalize_wording

RECORDS = read_families()


def make_document(unit: str, size: int) -> Document:
    return Document(unit, " ".join(f"{unit}{number}" for number in range(size // (len(unit) + 4))))


@pytest.fixture
def small_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [make_document("one", 80_000), make_document("two", 20_000)]
    corpus = Corpus((), lambda _root: iter(documents), hold_out_units("two"))
    monkeypatch.setitem(FAMILY_TEXTS, "mail_spam", corpus)


def test_every_task_has_words_texts_a_licence_and_siblings() -> None:
    assert list(RECORDS) == list(FAMILY_TEXTS)
    assert len(RECORDS) >= 30
    assert all(record.licence for record in RECORDS.values())
    assert len({record.wordings.title for record in RECORDS.values()}) == len(RECORDS)
    assert min(Counter(record.family for record in RECORDS.values()).values()) >= 2


def test_tasks_that_share_an_archive_are_one_family() -> None:
    by_archive = group_families(
        {name: [str(archive) for archive in FAMILY_TEXTS[name].archives] for name in RECORDS}
    )
    for name, first in by_archive.items():
        assert RECORDS[name].family == RECORDS[first].family, f"{name} and {first}"


@pytest.mark.parametrize("name", RECORDS)
def test_a_task_has_six_wordings_and_four_held_out_ones_in_other_words(name: str) -> None:
    wordings = RECORDS[name].wordings
    assert len(wordings.descriptions) >= 6
    assert len(wordings.heldout_descriptions) >= 4
    for heldout in map(normalize_wording, wordings.heldout_descriptions):
        for trained in map(normalize_wording, wordings.descriptions):
            first, second = set(heldout.split()), set(trained.split())
            assert len(first & second) <= 0.5 * len(first | second), (heldout, trained)
            assert SequenceMatcher(None, heldout, trained).ratio() <= 0.8, (heldout, trained)


def test_no_wording_stands_in_two_tasks_or_splits() -> None:
    counts = Counter(
        normalize_wording(wording)
        for record in RECORDS.values()
        for wording in record.wordings.descriptions + record.wordings.heldout_descriptions
    )
    assert [wording for wording, count in counts.items() if count > 1] == []


def test_a_task_that_is_a_domain_too_is_the_same_task() -> None:
    shared = set(FAMILY_TEXTS) & set(DOMAINS)
    assert len(shared) == 7
    assert all(FAMILY_TEXTS[name] is DOMAINS[name] for name in shared)


def test_archives_of_registries_with_versions_are_pinned() -> None:
    archives = {archive for corpus in FAMILY_TEXTS.values() for archive in corpus.archives}
    for archive in archives:
        assert archive.manager == "apt" or (archive.version and len(archive.sha256) == 64)


def test_brown_holds_out_whole_files_of_each_category() -> None:
    is_held_out = family_texts.FAMILY_TEXTS["press_reportage"].is_held_out
    assert [f"ca{n:02d}" for n in range(1, 15) if is_held_out(f"ca{n:02d}")] == [
        "ca03",
        "ca08",
        "ca13",
    ]


@pytest.mark.usefixtures("small_texts")
def test_a_task_comes_with_its_family(tmp_path: Path) -> None:
    (task,) = load_text_tasks("families", ["mail_spam"], cache_dir=tmp_path)
    assert (task.name, task.title, task.family) == ("mail_spam", "Spam", "mail")
    assert sum(map(len, task.train)) >= MIN_TRAIN_CHARS
    assert sum(map(len, task.test)) >= MIN_TEST_CHARS
    assert prepared_path(tmp_path, "mail_spam").exists()


def test_too_little_text_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [make_document("one", 80_000), make_document("two", 10_000)]
    corpus = Corpus((), lambda _root: iter(documents), hold_out_units("two"))
    monkeypatch.setitem(FAMILY_TEXTS, "mail_spam", corpus)
    with pytest.raises(InvalidTaskDataError, match=r"mail_spam: .* 60,000 and 15,000 are needed"):
        prepare_families(tmp_path, ["mail_spam"], lambda _line: None)


def test_unknown_tasks_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown task 'klingon'.*press_reportage"):
        load_text_tasks("families", ["klingon"], cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ('[arxiv]\nfamily = "reports"', "family and licence must be strings"),
        ('[x]\nfamily = "f"\nlicence = "MIT"\ntitle = "X"', "must have exactly the keys"),
        ('[x]\nfamily = "f"\nlicence = "MIT"', "no words, and no domain has that name"),
    ],
)
def test_a_wrong_table_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, message: str
) -> None:
    source = Path(text_families.__file__)
    for name in ("text_domains.toml", "text_families.toml"):
        (tmp_path / name).write_bytes(source.with_name(name).read_bytes())
    (tmp_path / "text_families.toml").write_text(table, encoding="utf-8")
    monkeypatch.setattr(text_families, "__file__", str(tmp_path / "text_families.py"))
    with pytest.raises(InvalidTaskDataError, match=message):
        read_families()


def test_the_recipe_takes_all_of_them_with_three_seeds() -> None:
    recipe = read_recipe("text-families")
    assert (recipe.tasks.source, recipe.tasks.names) == ("families", None)
    assert len(recipe.finetune.seeds) == len(recipe.generator_seeds) == 3
