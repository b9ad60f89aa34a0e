"""Preparing a domain: the one that needs no network, all the way to its file."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.errors import InvalidInputError, InvalidTaskDataError
from training.tasks import corpora, load_text_tasks, text_domains
from training.tasks.documents import MAX_TEST_CHARS, MAX_TRAIN_CHARS, Document, hold_out_units
from training.tasks.leakage import LEAKAGE_LIMIT
from training.tasks.prepared_texts import Corpus, prepared_path, read_prepared
from training.tasks.text_domains import prepare_domains


def make_text(word: str) -> str:
    return " ".join(f"{word}{i}" for i in range(100))


@pytest.fixture
def small_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Document(unit, make_text(unit)) for unit in ("one", "two", "three")]
    domain = Corpus((), lambda _root: iter(documents), hold_out_units("two"))
    monkeypatch.setitem(text_domains.DOMAINS, "recipes", domain)


@pytest.mark.usefixtures("small_domain")
def test_a_prepared_file_says_what_it_holds_and_is_not_redone(tmp_path: Path) -> None:
    lines: list[str] = []
    headers = prepare_domains(tmp_path, ["recipes"], lines.append)
    path = prepared_path(tmp_path, "recipes")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert rows[0] == headers["recipes"]
    assert rows[0]["train_docs"] == 2
    assert rows[0]["test_docs"] == 1
    assert rows[0]["train_chars"] == sum(len(r["text"]) for r in rows[1:] if r["split"] == "train")
    assert rows[0]["leakage"] == 0.0
    assert "standard library of Python 3." in rows[0]["sources"][0]["interpreter"]
    assert sorted(row["split"] for row in rows[1:]) == ["test", "train", "train"]
    assert read_prepared(tmp_path, "recipes").test == (make_text("two"),)
    before = path.stat().st_mtime_ns
    assert prepare_domains(tmp_path, ["recipes"], lines.append) == headers
    assert path.stat().st_mtime_ns == before
    assert "prepared before" in lines[-1]
    (task,) = load_text_tasks("domains", names=["recipes"], cache_dir=tmp_path)
    assert (task.name, task.title, task.test) == ("recipes", "Recipes", (make_text("two"),))


@pytest.mark.usefixtures("small_domain")
def test_a_file_of_an_older_format_is_redone(tmp_path: Path) -> None:
    prepare_domains(tmp_path, ["recipes"], lambda _line: None)
    path = prepared_path(tmp_path, "recipes")
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"format": 1', b'"format": 0', 1))
    with pytest.raises(InvalidTaskDataError, match="not prepared"):
        read_prepared(tmp_path, "recipes")
    prepare_domains(tmp_path, ["recipes"], lambda _line: None)
    assert path.read_bytes() == content


@pytest.mark.usefixtures("small_domain")
@pytest.mark.parametrize("kept", [5, 200, -1, -1000])
def test_a_damaged_file_is_an_error(tmp_path: Path, kept: int) -> None:
    prepare_domains(tmp_path, ["recipes"], lambda _line: None)
    path = prepared_path(tmp_path, "recipes")
    content = path.read_bytes()
    path.write_bytes(content[:kept] if kept != -1 else content.rpartition(b"\n{")[0] + b"\n")
    with pytest.raises(InvalidTaskDataError, match=r"is damaged: delete it"):
        read_prepared(tmp_path, "recipes")


def test_a_split_that_leaks_or_is_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formula = "f" * 160  # two windows of a passage of 30: below the share that drops a passage
    long = " ".join(make_text(word) for word in "abcde")
    leaking = [Document("one", formula + make_text("x")), Document("two", formula + long)]
    for documents, message in ((leaking, "limit 1%"), (leaking[:1], "no documents")):

        def read(_root: Path, found: list[Document] = documents) -> Iterator[Document]:
            return iter(found)

        domain = Corpus((), read, hold_out_units("two"))
        monkeypatch.setitem(text_domains.DOMAINS, "recipes", domain)
        with pytest.raises(InvalidTaskDataError, match=message):
            prepare_domains(tmp_path, ["recipes"], lambda _line: None)
        assert not prepared_path(tmp_path, "recipes").exists()


def test_unknown_domains_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"unknown task 'klingon'.*arxiv, wikipedia_en"):
        load_text_tasks("domains", names=["klingon"], cache_dir=tmp_path)


def test_the_standard_library_makes_a_whole_domain(tmp_path: Path) -> None:
    header = prepare_domains(tmp_path, ["python"], lambda _line: None)["python"]
    assert 0.9 * MAX_TRAIN_CHARS < header["train_chars"] <= MAX_TRAIN_CHARS
    assert 0.5 * MAX_TEST_CHARS < header["test_chars"] <= MAX_TEST_CHARS
    assert header["leakage"] < LEAKAGE_LIMIT
    split = read_prepared(tmp_path, "python")
    assert any("def " in passage for passage in split.test)


def test_no_module_is_on_both_sides() -> None:
    is_held_out = text_domains.DOMAINS["python"].is_held_out
    sides: dict[str, set[bool]] = {}
    for document in corpora.read_python(Path("unused")):
        sides.setdefault(document.unit, set()).add(is_held_out(document.unit))
    assert all(len(side) == 1 for side in sides.values())
    assert {True} in sides.values()
