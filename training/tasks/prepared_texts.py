"""Texts of a task, fetched, split without leaks, and kept in the cache.

A prepared file is JSON lines: a header (provenance and measured counts), then one row
`{"split": ..., "text": ...}` a passage. It is written whole or not at all and never redone.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidTaskDataError
from training.tasks.archives import Archive, fetch_archive, hash_file, unpack_archive
from training.tasks.cache import open_scratch_dir, write_atomically
from training.tasks.documents import MAX_QUOTED_SHARE, Document, Split, split_documents
from training.tasks.leakage import LEAKAGE_LIMIT, LEAKAGE_WINDOW, measure_leakage

PREPARED_FORMAT = 1  # raise it when readers or splits change: prepared files are then redone


@dataclass(frozen=True, slots=True)
class Corpus:
    """The archives of a task's texts, the reader of their documents and the rule of the split.

    Attributes:
        archives: packages that hold the texts.
        read: turns the folder of unpacked archives into documents.
        is_held_out: says of a document's unit whether it is held out.
        max_quoted_share: of a held-out passage's windows that may stand in the training text;
            below the usual where phrases are common to many documents.
    """

    archives: tuple[Archive, ...]
    read: Callable[[Path], Iterator[Document]]
    is_held_out: Callable[[str], bool]
    max_quoted_share: float = MAX_QUOTED_SHARE


def prepare_corpora(
    corpora: Mapping[str, Corpus], cache_dir: Path, progress: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """Fetch and prepare corpora, those that are not yet; return each one's header by task name.

    Args:
        corpora: by task name.
        cache_dir: folder for archives and prepared files.
        progress: called with a line of text at each step.

    Raises:
        MissingDependencyError: a registry's client is missing or could not fetch.
        InvalidTaskDataError: a source does not hold what it should, or its split leaks.
    """
    headers: dict[str, dict[str, Any]] = {}
    for index, (name, corpus) in enumerate(corpora.items(), start=1):
        header = _read_header(prepared_path(cache_dir, name))
        state = "prepared before"
        if header is None:
            header = _prepare_corpus(name, corpus, cache_dir, progress)
            state = "prepared"
        headers[name] = header
        progress(
            f"[{index}/{len(corpora)}] {name}: {state}, {header['train_chars']:,} characters to "
            f"train on, {header['test_chars']:,} held out, leakage {header['leakage']:.3%}"
        )
    return headers


def prepared_path(cache_dir: Path, name: str) -> Path:
    """Return where a task's prepared file lies."""
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


def _prepare_corpus(
    name: str, corpus: Corpus, cache_dir: Path, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Fetch, read, split and write one corpus; return the header that was written."""
    archives = {
        archive: fetch_archive(archive, cache_dir / "archives", progress)
        for archive in corpus.archives
    }
    progress(f"preparing {name}")
    with open_scratch_dir(cache_dir) as scratch:
        for archive, path in archives.items():
            unpack_archive(path, scratch / archive.folder_name)
        split = split_documents(corpus.read(scratch), corpus.is_held_out, corpus.max_quoted_share)
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
