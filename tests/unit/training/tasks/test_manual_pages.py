"""Manual pages: what a reader would see, without troff's marks."""

import gzip
from pathlib import Path

from training.tasks.manual_pages import read_manual_pages, render_manual_page

PAGE = r""".\" Copyright nobody
.TH accept 2 2022-12-04 "Linux"
.SH NAME
accept, accept4 \- accept a connection on a socket
.SH SYNOPSIS
.nf
.B #include <sys/socket.h>
.PP
.BI "int accept(int " sockfd ", int " flags );
.fi
.SH DESCRIPTION
The
.BR accept ()
system call is
used with \fIsockets\fP.\" really
.TP
\fB\-a\fP, \fB\-\-all\fP
Do not \(lqignore\(rq.
"""


def test_fonts_and_macros_go_and_paragraphs_stay() -> None:
    assert render_manual_page(PAGE) == (
        "NAME\naccept, accept4 - accept a connection on a socket\n\n"
        "SYNOPSIS\n#include <sys/socket.h>\n\nint accept(int sockfd, int flags);\n\n"
        "DESCRIPTION\nThe accept() system call is used with sockets.\n\n"
        '-a, --all Do not "ignore".'
    )


def test_pages_of_other_macros_and_pointers_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "apt-m" / "usr" / "share" / "man" / "de" / "man1"
    folder.mkdir(parents=True)
    pages = {"ls.1": PAGE, "dir.1": ".so man1/ls.1\n", "bsd.1": ".Dd May 1\n", "t.1": "x\n.TS\n"}
    for name, text in pages.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    (folder / "link.1.gz").symlink_to("ls.1.gz")
    (document,) = read_manual_pages("de/man1")(tmp_path)
    assert document.unit == "ls.1"
    assert document.text == render_manual_page(PAGE)
