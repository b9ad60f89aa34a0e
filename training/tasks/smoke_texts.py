"""Four small text tasks made from the running interpreter: no network, no files of ours.

For tests and for the smoke recipe. The texts are those of the interpreter's own library, so they
are the same on every machine with the same Python release.
"""

import inspect
import pydoc_data.topics
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from html.entities import html5
from importlib import import_module
from pathlib import Path

from training.tasks.documents import Document, hold_out_share, hold_out_units, split_documents
from training.tasks.text_task import TextTask, build_task, read_wordings, select_names

CODE_MODULES = ("bisect", "fnmatch", "heapq", "queue", "sched", "shlex", "textwrap")
REFERENCE_TOPICS = (
    *("assignment", "calls", "class", "comparisons", "context-managers", "exceptions"),
    *("execmodel", "for", "function", "global", "import", "raise", "strings", "yield"),
)
LINES_A_DOCUMENT = 24


def load_smoke_texts(names: Sequence[str] | None = None) -> tuple[TextTask, ...]:
    """Make the smoke tasks; wordings are read from `smoke_texts.toml`.

    Raises:
        InvalidInputError: an unknown name.
    """
    wordings = read_wordings(Path(__file__).with_name("smoke_texts.toml"))
    tasks = []
    for name in select_names(tuple(SMOKE_TASKS), names):
        read, is_held_out = SMOKE_TASKS[name]
        split = split_documents(read(), is_held_out)
        tasks.append(build_task(name, wordings[name], split.train, split.test))
    return tuple(tasks)


def read_python_code() -> Iterator[Document]:
    """Source code of a few modules; a module is one unit."""
    for name in CODE_MODULES:
        yield Document(unit=name, text=inspect.getsource(import_module(name)))


def read_python_reference() -> Iterator[Document]:
    """Sections of the language reference that `help()` shows; a section is one unit."""
    for topic in REFERENCE_TOPICS:
        yield Document(unit=topic, text=pydoc_data.topics.topics[topic])


def read_unicode_names() -> Iterator[Document]:
    """Tables of code points and character names, e.g. `U+00E9 LATIN SMALL LETTER E WITH ACUTE`."""
    named = ((code, unicodedata.name(chr(code), "")) for code in range(0x20, 0x590))
    yield from _cut_table(f"U+{code:04X} {name}" for code, name in named if name)


def read_html_entities() -> Iterator[Document]:
    """Tables of HTML entities, e.g. `&eacute; = &#233;`."""
    named = ((name, text) for name, text in html5.items() if name.endswith(";"))
    yield from _cut_table(
        f"&{name} = " + "".join(f"&#{ord(char)};" for char in text) for name, text in named
    )


def _cut_table(lines: Iterator[str]) -> Iterator[Document]:
    table = sorted(lines)
    for start in range(0, len(table), LINES_A_DOCUMENT):
        rows = table[start : start + LINES_A_DOCUMENT]
        yield Document(unit=rows[0], text="\n".join(rows))


SMOKE_TASKS: dict[str, tuple[Callable[[], Iterator[Document]], Callable[[str], bool]]] = {
    "python_code": (read_python_code, hold_out_units("queue", "shlex")),
    "python_reference": (read_python_reference, hold_out_units("calls", "exceptions", "raise")),
    "unicode_names": (read_unicode_names, hold_out_share(0.2)),
    "html_entities": (read_html_entities, hold_out_share(0.2)),
}
