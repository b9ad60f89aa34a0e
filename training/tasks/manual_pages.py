"""Read manual pages (troff with the `man` macros) as plain text, without troff."""

import gzip
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from training.tasks.documents import Document

ESCAPE = re.compile(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,:%|^]|\\\*\(..|\\m\[\w*\]")
ESCAPED_CHARS = {
    r"\-": "-",
    r"\(em": "-",
    r"\(en": "-",
    r"\(bu": "*",
    r"\[bu]": "*",
    r"\(aq": "'",
    r"\[aq]": "'",
    r"\(cq": "'",
    r"\(oq": "`",
    r"\(dq": '"',
    r"\(lq": '"',
    r"\(rq": '"',
    r"\(co": "(C)",
    r"\(ti": "~",
    r"\(ha": "^",
    r"\(rs": "\\",
    r"\e": "\\",
    r"\ ": " ",
}
ARGUMENT = re.compile(r'"([^"]*)"|(\S+)')
ALTERNATING_FONTS = frozenset({"BR", "BI", "RB", "RI", "IR", "IB"})
FONTS = frozenset({"B", "I", "SM", "SB"})
PARAGRAPHS = frozenset({"PP", "P", "LP", "TP", "IP", "HP", "sp", "TQ", "RS", "RE", "br"})
UNREAD_MACROS = ("\n.Dd ", "\n.TS", "\n.so ", "\n'\\\" t")
"""Pages with them are left out: the `mdoc` macros, tables, and pointers to another page."""


def read_manual_pages(*sections: str) -> Callable[[Path], Iterator[Document]]:
    """Return a reader of some sections' pages, each its own unit, named as in all languages.

    Args:
        sections: names of sections with their language, e.g. "de/man1"; "man2" for English.
    """

    def read(root: Path) -> Iterator[Document]:
        for section in sections:
            for path in sorted(root.glob(f"*/usr/share/man/{section}/*.gz")):
                source = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
                if not path.is_symlink() and not any(m in "\n" + source for m in UNREAD_MACROS):
                    yield Document(path.name.removesuffix(".gz"), render_manual_page(source))

    return read


def render_manual_page(source: str) -> str:
    """Return a page's text: one line a paragraph, headings on lines of their own, no fonts."""
    lines: list[str] = []
    words: list[str] = []
    verbatim = False

    def end_paragraph(separator: str = "") -> None:
        if words:
            lines.extend([" ".join(words), ""])
            words.clear()
        if separator:
            lines.append(separator)

    for line in source.splitlines():
        text = _read_line(line)
        macro = line[1:].split(maxsplit=1)[0] if line[:1] in (".", "'") and line[1:].split() else ""
        if macro in ("SH", "SS"):
            end_paragraph(text)
        elif macro in ("nf", "EX"):
            end_paragraph()
            verbatim = True
        elif macro in ("fi", "EE"):
            verbatim = False
            lines.append("")
        elif verbatim:
            lines.append(text)
        elif macro in PARAGRAPHS or not line.strip():
            end_paragraph()
        elif text:
            words.append(text.strip())
    end_paragraph()
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _read_line(line: str) -> str:
    """Return what a line prints; a macro that prints nothing gives nothing."""
    if line[:1] in (".", "'"):
        macro, _, rest = line[1:].strip().partition(" ")
        arguments = [quoted or plain for quoted, plain in ARGUMENT.findall(rest)]
        if macro in ALTERNATING_FONTS:
            line = "".join(arguments)
        elif macro in FONTS or macro in ("SH", "SS"):
            line = " ".join(arguments)
        else:
            return ""
    line = re.sub(r'\\["#].*', "", line)
    line = ESCAPE.sub("", line)
    for escaped, char in ESCAPED_CHARS.items():
        line = line.replace(escaped, char)
    return line
