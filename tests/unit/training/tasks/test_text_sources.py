"""Every source of text tasks, through the one function that callers use."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.errors import (
    InvalidInputError,
    InvalidRecipeError,
    InvalidTaskDataError,
    MissingDependencyError,
)
from training.tasks import TextTask, load_text_tasks
from training.tasks.leakage import LEAKAGE_LIMIT, measure_leakage
from training.tasks.text_hub import collect_texts

TASK_TOML = """
title = "Letters"
descriptions = ["Write a letter.", "Continue this letter."]
heldout_descriptions = ["Answer my mail."]
"""
HUB_TOML = """
dataset = "{dataset}"
task_column = "meta.kind"
text_column = "text"
train_split = "train"
test_split = "test"

[tasks.letters]
label = "Letters (en)"
title = "Letters"
descriptions = ["Write a letter."]
heldout_descriptions = ["Answer my mail."]
"""


def make_folder(root: Path, *files: str, toml: str = TASK_TOML) -> Path:
    for file in files:
        path = root / "letters" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {file}", encoding="utf-8")
    (root / "letters" / "task.toml").write_text(toml, encoding="utf-8")
    return root


def make_jsonl(root: Path, *rows: object, toml: str = "[letters]" + TASK_TOML) -> Path:
    path = root / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    (root / "tasks.toml").write_text(toml, encoding="utf-8")
    return path


def make_row(split: str, text: str, task: str = "letters") -> dict[str, str]:
    return {"task": task, "split": split, "text": text}


@pytest.mark.parametrize(
    "source", ["", "pile", "folder", "folder:", "domains:x", "Smoke", "https://example.org"]
)
def test_an_unknown_source_lists_the_known_ones(source: str) -> None:
    with pytest.raises(InvalidRecipeError, match=r"domains, families, smoke, folder:PATH, jsonl:"):
        load_text_tasks(source)


def test_smoke_tasks_are_small_complete_and_always_the_same() -> None:
    tasks = load_text_tasks("smoke")
    assert [task.name for task in tasks] == [
        "python_code",
        "python_reference",
        "unicode_names",
        "html_entities",
    ]
    for task in tasks:
        train_chars, test_chars = sum(map(len, task.train)), sum(map(len, task.test))
        assert 20_000 < train_chars < 100_000, task.name
        assert 5_000 < test_chars < 40_000, task.name
        assert measure_leakage(task.train, task.test) < LEAKAGE_LIMIT, task.name
    assert load_text_tasks("smoke") == tasks
    assert load_text_tasks("smoke", names=["html_entities", "python_code"]) == (tasks[3], tasks[0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["recipies"], "unknown task 'recipies'.*known: python_code, python_reference"),
        (["python_code", "python_code"], "repeated"),
    ],
)
def test_wrong_names_list_the_known_ones(names: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load_text_tasks("smoke", names=names)


def test_a_folder_with_both_sides(tmp_path: Path) -> None:
    make_folder(tmp_path, "train/b.txt", "train/a.txt", "test/c.txt")
    assert load_text_tasks(f"folder:{tmp_path}") == (
        TextTask(
            name="letters",
            title="Letters",
            descriptions=("Write a letter.", "Continue this letter."),
            heldout_descriptions=("Answer my mail.",),
            train=("text of train/a.txt", "text of train/b.txt"),
            test=("text of test/c.txt",),
        ),
    )


def test_a_folder_of_loose_files_holds_out_a_fifth(tmp_path: Path) -> None:
    make_folder(tmp_path, *(f"{i}.txt" for i in range(10)))
    (task,) = load_text_tasks(f"folder:{tmp_path}")
    assert len(task.test) == 2
    assert sorted(task.train + task.test) == [f"text of {i}.txt" for i in range(10)]
    assert load_text_tasks(f"folder:{tmp_path}") == (task,)


@pytest.mark.parametrize(
    "files",
    [(), ("only.txt",), ("train/a.txt",), ("train/a.txt", "test/b.txt", "loose.txt")],
)
def test_a_folder_that_cannot_be_split_is_an_error(tmp_path: Path, files: tuple[str, ...]) -> None:
    (tmp_path / "letters").mkdir()
    make_folder(tmp_path, *files)
    with pytest.raises(InvalidTaskDataError, match="train/ and test/"):
        load_text_tasks(f"folder:{tmp_path}")


def test_a_folder_without_tasks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskDataError, match=r"one sub-folder a task"):
        load_text_tasks(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("title =", "not valid TOML"),
        ('title = "x"', "exactly the keys"),
        (TASK_TOML + "extra = 1", "exactly the keys"),
        (TASK_TOML.replace('["Answer my mail."]', '"Answer my mail."'), "list of strings"),
        (TASK_TOML.replace('"Letters"', "7"), "must be a string"),
        (TASK_TOML.replace('"Letters"', '" "'), "title is empty"),
        (TASK_TOML.replace('["Answer my mail."]', "[]"), "heldout_descriptions is empty"),
        (TASK_TOML.replace("Answer my mail.", " write a LETTER"), "both a training and a held-out"),
    ],
)
def test_a_wrong_task_file_says_what_is_wrong(tmp_path: Path, toml: str, message: str) -> None:
    make_folder(tmp_path, "train/a.txt", "test/b.txt", toml=toml)
    with pytest.raises(InvalidTaskDataError, match=message):
        load_text_tasks(f"folder:{tmp_path}")


def test_text_must_be_utf_8(tmp_path: Path) -> None:
    make_folder(tmp_path, "train/a.txt", "test/b.txt")
    (tmp_path / "letters" / "train" / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InvalidTaskDataError, match="not UTF-8"):
        load_text_tasks(f"folder:{tmp_path}")


def test_jsonl_rows_become_tasks(tmp_path: Path) -> None:
    tables = "[letters]" + TASK_TOML + "[poems]" + TASK_TOML.replace("Letters", "Poems")
    path = make_jsonl(
        tmp_path,
        make_row("train", "dear\u2028Ada"),
        make_row("test", "rose", task="poems"),
        make_row("test", "yours"),
        make_row("train", "violet", task="poems"),
        toml=tables,
    )
    letters, poems = load_text_tasks(f"jsonl:{path}")
    assert (letters.train, letters.test) == (("dear\u2028Ada",), ("yours",))
    assert (poems.title, poems.train, poems.test) == ("Poems", ("violet",), ("rose",))
    assert load_text_tasks(f"jsonl:{path}", names=["poems"]) == (poems,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"task": "letters", "text": "x"}, "line 2: a row must"),
        (make_row("validation", "x"), "line 2: a row must"),
        (["letters"], "line 2: a row must"),
        ({**make_row("train", ""), "text": 3}, "line 2: a row must"),
        (make_row("train", "x", task="poems"), "'poems' is not described"),
        (make_row("train", "another"), "test is empty"),
    ],
)
def test_a_wrong_row_is_an_error_with_its_line(tmp_path: Path, row: object, message: str) -> None:
    path = make_jsonl(tmp_path, make_row("train", "x"), row)
    with pytest.raises(InvalidTaskDataError, match=message):
        load_text_tasks(f"jsonl:{path}")


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(InvalidTaskDataError, match=r"tasks\.toml is not there"):
        load_text_tasks(f"jsonl:{tmp_path / 'rows.jsonl'}")
    make_jsonl(tmp_path).write_text("{", encoding="utf-8")
    with pytest.raises(InvalidTaskDataError, match="not JSON"):
        load_text_tasks(f"jsonl:{tmp_path / 'rows.jsonl'}")
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InvalidTaskDataError, match="is not there"):
        load_text_tasks(f"jsonl:{tmp_path / 'rows.jsonl'}")


def make_hub(root: Path) -> Path:
    data = root / "data"
    data.mkdir()
    for split in ("train", "test"):
        rows = [{"text": f"{split} {i}", "meta": {"kind": kind}} for i, kind in enumerate(
            ["Letters (en)", "Poems", "Letters (en)"]
        )]  # fmt: skip
        (data / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    path = root / "hub.toml"
    path.write_text(HUB_TOML.format(dataset=data.as_posix()), encoding="utf-8")
    return path


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the extra hub")
def test_a_hub_data_set_is_read_by_its_columns(tmp_path: Path) -> None:
    (letters,) = load_text_tasks(f"hub:{make_hub(tmp_path)}")
    assert letters.train == ("train 0", "train 2")
    assert letters.test == ("test 0", "test 2")


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # what an absent package looks like
    with pytest.raises(MissingDependencyError, match=r"icm-lora\[hub\]"):
        load_text_tasks(f"hub:{make_hub(tmp_path)}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('text_column = "text"', "", "exactly the keys"),
        ('label = "Letters (en)"', "", "needs a label"),
        ('title = "Letters"', "", "exactly the keys"),
    ],
)
def test_a_wrong_hub_file_is_an_error(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = make_hub(tmp_path)
    path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(InvalidTaskDataError, match=message):
        load_text_tasks(f"hub:{path}")


def test_streaming_stops_when_every_task_has_enough() -> None:
    config = {"task_column": "meta.kind", "text_column": "text"}
    seen = []

    def stream() -> Iterator[dict[str, Any]]:
        for i in range(100):
            seen.append(i)
            yield {"text": "12345", "meta": {"kind": "ab"[i % 2]}}

    texts = collect_texts(stream(), config, {"a": "first", "b": "second"}, max_chars=12)
    assert texts == {"first": ["12345"] * 3, "second": ["12345"] * 3}
    assert len(seen) == 6


def test_a_missing_column_is_an_error() -> None:
    config = {"task_column": "meta.source", "text_column": "text"}
    with pytest.raises(InvalidTaskDataError, match=r"no column 'meta\.source'.*text, meta"):
        collect_texts([{"text": "x", "meta": {}}], config, {"a": "b"}, max_chars=1)


def test_a_key_outside_a_table_is_an_error(tmp_path: Path) -> None:
    path = make_jsonl(tmp_path, toml='title = "x"')
    with pytest.raises(InvalidTaskDataError, match="outside a table"):
        load_text_tasks(f"jsonl:{path}")
    hub = make_hub(tmp_path)
    hub.write_text(hub.read_text().partition("[tasks")[0] + "[tasks]\nletters = 1\n")
    with pytest.raises(InvalidTaskDataError, match="must be a table"):
        load_text_tasks(f"hub:{hub}")
