"""Read mailing-list messages: what their authors wrote, without quotes, signatures and footers."""

import email
import email.policy
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from training.tasks.documents import Document

LINUX_LISTS = (
    "ilug@linux.ie",
    "rpm-zzzlist@freshrpms.net",
    "razor-users@",
    "spamassassin-talk@",
    "spamassassin-devel@",
    "exmh-users@",
    "exmh-workers@",
    "secprog@",
    "webdev@linux.ie",
    "limbo-list@",
)
REPEATED_LINE_CHARS = 25
REPEATED_LINE_COUNT = 3

SUBJECT_NOISE = re.compile(r"^\s*(?:(?:re|fwd?|aw|antw)(?:\[\d+\])?\s*:|\[[^\]]*\])\s*", re.I)
FOOTER_START = re.compile(
    r"^(?:--\s*$|_{10,}|-{20,}|={20,}|-+\s*(?:original message|forwarded message|begin pgp sig)"
    r"|this sf\.net email is sponsored|irish linux users' group)",
    re.I,
)
ATTRIBUTION = re.compile(
    r"^[^\n]*(?:\n[^\n]+)?\b(?:wrote|writes|said|spake thusly|schrieb|expressed the following)"
    r"[^\n]{0,40}:\s*$",
    re.MULTILINE,
)
QUOTE = re.compile(r"^\s*(?:[A-Za-z]{1,4})?[>|}]")
PGP_START = re.compile(r"^-----BEGIN PGP SIGNED MESSAGE-----\n(?:Hash:[^\n]*\n)?", re.MULTILINE)


def read_linux_lists(root: Path) -> Iterator[Document]:
    """Read help lists of Linux and Unix users, one document a message, one unit a thread."""
    yield from _read_messages(root, ("easy-ham-1", "easy-ham-2"), LINUX_LISTS)


def read_fork_list(root: Path) -> Iterator[Document]:
    """Read a list of friends who talk about news, politics and technology; units as above."""
    yield from _read_messages(root, ("easy-ham-1", "easy-ham-2"), ("fork@",))


def read_spam(root: Path) -> Iterator[Document]:
    """Read unsolicited advertising mail, one document a message, one unit a subject."""
    yield from _read_messages(root, ("spam-1", "spam-2"), ("",))


def _read_messages(root: Path, folders: Sequence[str], lists: Sequence[str]) -> Iterator[Document]:
    """Read the messages of some folders and lists, without the long lines that many have."""
    messages = []
    for folder in folders:
        for path in sorted(root.glob(f"*/package/data/{folder}/*.txt")):
            message = read_message(path.read_bytes(), lists)
            if message is not None:
                messages.append(message)
    lines = Counter(line for _, body in messages for line in set(_long_lines(body)))
    for subject, body in messages:
        repeated = {ln for ln in _long_lines(body) if lines[ln] >= REPEATED_LINE_COUNT}
        kept = "\n".join(ln for ln in body.splitlines() if ln.strip() not in repeated)
        yield Document(unit=subject.lower(), text=f"Subject: {subject}\n\n{kept.strip()}")


def read_message(raw: bytes, lists: Sequence[str] = LINUX_LISTS) -> tuple[str, str] | None:
    """Return (thread subject, the author's own words), or None where it is not one of the lists.

    Args:
        raw: the message with its headers.
        lists: parts of addresses, one of which must be among the recipients' in lower case.
    """
    message = email.message_from_bytes(
        re.sub(rb"\A(?:From [^\n]*|\s*)\n", b"", raw), policy=email.policy.compat32
    )
    to = " ".join(str(message.get(name, "")) for name in ("List-Post", "X-Beenthere", "To", "Cc"))
    if not any(name in to.lower() for name in lists):
        return None
    body = _decode_body(message)
    subject = str(message.get("Subject", ""))
    return (normalize_subject(subject), strip_message(body)) if body else None


def normalize_subject(subject: str) -> str:
    """Reduce a subject to its thread: no `Re:`, no `[list]`, no `(was: ...)`, single spaces."""
    subject = " ".join(subject.split())
    while (shorter := SUBJECT_NOISE.sub("", subject)) != subject:
        subject = shorter
    return re.sub(r"\s*\(was:?.*$", "", subject, flags=re.I).strip()


def strip_message(body: str) -> str:
    """Keep what the author wrote: cut footers, drop quoted lines and the lines that lead them."""
    body = PGP_START.sub("", body.replace("\r\n", "\n"))
    lines = []
    for line in body.splitlines():
        if FOOTER_START.match(line):
            break
        lines.append("" if QUOTE.match(line) else line.rstrip())
    body = ATTRIBUTION.sub("", "\n".join(lines))
    return re.sub(r"\n{3,}", "\n\n", body).strip()


def _decode_body(message: "email.message.Message[str, str]") -> str:
    """Return the first plain-text part, decoded; empty where there is none."""
    for part in message.walk():
        if part.get_content_type() != "text/plain":
            continue
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            try:
                return payload.decode(part.get_content_charset() or "latin-1", errors="replace")
            except LookupError:  # a charset that no codec knows
                return payload.decode("latin-1")
    return ""


def _long_lines(body: str) -> list[str]:
    stripped = (line.strip() for line in body.splitlines())
    return [line for line in stripped if len(line) >= REPEATED_LINE_CHARS]
