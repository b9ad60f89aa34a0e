"""Mail: what stays of a message is what its author wrote."""

from pathlib import Path

import pytest

from training.tasks.mailing_list import (
    normalize_subject,
    read_fork_list,
    read_linux_lists,
    read_message,
    read_spam,
    strip_message,
)

BODY = """On Tue, 27 Aug 2002, Jon wrote:

> What would be a good distribution for an old laptop?
> It has only a floppy drive.

Have done exactly this with Debian, over a null modem cable.

Gavin
--\u0020
Irish Linux Users' Group: ilug@linux.ie
http://www.linux.ie/mailman/listinfo/ilug for (un)subscription information.
"""


def make_message(subject: str, body: str, to: str = "ilug@linux.ie", extra: str = "") -> bytes:
    head = (
        f"From jon@example.org  Wed Aug 28 10:47:36 2002\nFrom: Jon <jon@example.org>\nTo: {to}\n"
    )
    return f"{head}Subject: {subject}\n{extra}\n{body}".encode("latin-1")


def test_quotes_and_footers_go() -> None:
    assert strip_message(BODY) == (
        "Have done exactly this with Debian, over a null modem cable.\n\nGavin"
    )


@pytest.mark.parametrize(
    "line",
    [
        "_______________________________________________",
        "-----Original Message-----",
        "This sf.net email is sponsored by: Dice - The leading online job board",
        "-------------------------------------------------------",
    ],
)
def test_everything_below_a_footer_goes(line: str) -> None:
    assert strip_message(f"My words.\n\n{line}\nnot mine") == "My words."


@pytest.mark.parametrize("line", ["> quoted", "JM> quoted", "  | quoted", "} quoted"])
def test_quote_marks(line: str) -> None:
    assert strip_message(f"{line}\nmy answer") == "my answer"


def test_signed_messages_lose_their_armour() -> None:
    signed = (
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nhello\n\n"
        "-----BEGIN PGP SIGNATURE-----\nabc\n-----END PGP SIGNATURE-----\n"
    )
    assert strip_message(signed) == "hello"


@pytest.mark.parametrize(
    ("subject", "thread"),
    [
        ("Re: [ILUG] Got me a\n crappy laptop", "Got me a crappy laptop"),
        ("RE: Re[2]: FWD: [ILUG-Social] Re: cats", "cats"),
        ("new thing (was: old thing)", "new thing"),
        ("", ""),
    ],
)
def test_subjects_reduce_to_their_thread(subject: str, thread: str) -> None:
    assert normalize_subject(subject) == thread


def test_only_the_linux_lists_are_read() -> None:
    assert read_message(make_message("Re: [ILUG] hi", "words")) == ("hi", "words")
    assert read_message(make_message("hi", "words", to="fork@example.com")) is None


def test_other_lists_and_advertising_have_readers_of_their_own(tmp_path: Path) -> None:
    recipients_by_folder = {
        "easy-ham-2": ("fork@example.com", "ilug@linux.ie"),
        "spam-1": ("jon@x.org",),
    }
    for name, recipients in recipients_by_folder.items():
        folder = tmp_path / "npm-mail" / "package" / "data" / name
        folder.mkdir(parents=True)
        for number, recipient in enumerate(recipients):
            text = make_message(f"to {recipient}", "words", to=recipient)
            (folder / f"{number}.txt").write_bytes(text)
    units = [[d.unit for d in read(tmp_path)] for read in (read_fork_list, read_spam)]
    assert units == [["to fork@example.com"], ["to jon@x.org"]]


def test_encodings_are_decoded_and_unknown_ones_do_not_stop() -> None:
    quoted = "Content-Type: text/plain; charset=iso-8859-1\nContent-Transfer-Encoding: {}\n"
    message = make_message("x", "caf=E9", extra=quoted.format("quoted-printable"))
    assert read_message(message) == ("x", "caf\u00e9")
    unknown = make_message("x", "caf\xe9", extra="Content-Type: text/plain; charset=klingon\n")
    assert read_message(unknown) == ("x", "caf\u00e9")
    html = make_message("x", "<p>hi</p>", extra="Content-Type: text/html\n")
    assert read_message(html) is None


def test_lines_that_many_messages_share_go(tmp_path: Path) -> None:
    folder = tmp_path / "npm-mail" / "package" / "data" / "easy-ham-1"
    folder.mkdir(parents=True)
    motto = "Linux: the choice of a GNU generation"
    for i in range(3):
        text = make_message(f"Re: question {i % 2}", f"answer {i}\n{motto}\n")
        (folder / f"{i}.txt").write_bytes(text)
    documents = list(read_linux_lists(tmp_path))
    assert [document.unit for document in documents] == ["question 0", "question 1", "question 0"]
    assert [document.text for document in documents] == [
        f"Subject: question {i % 2}\n\nanswer {i}" for i in range(3)
    ]
