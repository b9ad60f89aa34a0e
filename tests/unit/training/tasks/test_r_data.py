"""R databases: built here byte by byte after R Internals, and read back."""

import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.errors import InvalidTaskDataError
from training.tasks.r_data import read_character_vectors


def pack_string(text: str | None) -> bytes:
    if text is None:
        return struct.pack(">ii", 0x00000009, -1)
    data = text.encode()
    return struct.pack(">ii", 0x00040009, len(data)) + data


def pack_vector(strings: list[str | None], version: int = 3) -> bytes:
    head = b"X\n" + struct.pack(">iii", version, 0x040201, 0x030500)
    if version == 3:
        head += struct.pack(">i", 5) + b"UTF-8"
    return head + struct.pack(">ii", 16, len(strings)) + b"".join(map(pack_string, strings))


def pack_database(*entries: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(entry)) + zlib.compress(entry) for entry in entries)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(max_size=8), max_size=5), max_size=4), st.sampled_from([2, 3]))
def test_reads_what_was_written(tmp_path: Path, vectors: list[list[str]], version: int) -> None:
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(pack_database(*(pack_vector(list(v), version) for v in vectors)))
    assert list(read_character_vectors(path)) == vectors


def test_missing_strings_are_empty_and_other_objects_are_skipped(tmp_path: Path) -> None:
    numbers = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">iii", 13, 1, 7)
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(pack_database(numbers, pack_vector(["a", None])))
    assert list(read_character_vectors(path)) == [["a", ""]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x00\x04not zlib", "not a zlib"),
        (pack_database(b"A\n2\n"), "only the XDR"),
        (
            pack_database(pack_vector(["a"]).replace(b"\x00\x04\x00\x09", b"\x00\x04\x00\x08")),
            "else",
        ),
    ],
)
def test_refuses_what_is_no_such_database(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(content)
    with pytest.raises(InvalidTaskDataError, match=message):
        list(read_character_vectors(path))
