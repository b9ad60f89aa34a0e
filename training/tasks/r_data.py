"""Read character vectors out of an R package's lazy-load database, without R.

Format: R Internals, "Serialization Formats" (XDR) and `lazyLoadDBfetch` in R's serialize.c.
"""

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from service.errors import InvalidTaskDataError

CHARSXP = 9
STRSXP = 16
MISSING_LENGTH = -1


def read_character_vectors(database: Path) -> Iterator[list[str]]:
    """Yield each character vector of an `.rdb` file, in file order, as a list of strings.

    The file is a row of entries: 4 bytes of uncompressed size (big endian), then a zlib stream.
    Entries that hold anything but a plain character vector are skipped.

    Raises:
        InvalidTaskDataError: the file is not such a database.
    """
    data = database.read_bytes()
    while data:
        stream = zlib.decompressobj()
        try:
            entry = stream.decompress(data[4:])
        except zlib.error as error:
            raise InvalidTaskDataError(f"{database.name}: not a zlib R database") from error
        data = stream.unused_data
        vector = _parse_character_vector(entry)
        if vector is not None:
            yield vector


def _parse_character_vector(entry: bytes) -> list[str] | None:
    """Parse one serialised object (versions 2 and 3); None where it is not a character vector."""
    if entry[:2] != b"X\n":
        raise InvalidTaskDataError("R data: only the XDR serialisation is read")
    (version,) = struct.unpack_from(">i", entry, 2)
    offset = 14
    if version == 3:  # the name of the native encoding follows
        (length,) = struct.unpack_from(">i", entry, offset)
        offset += 4 + length
    flags, count = struct.unpack_from(">ii", entry, offset)
    if flags & 0xFF != STRSXP:
        return None
    offset += 8
    strings = []
    for _ in range(count):
        flags, length = struct.unpack_from(">ii", entry, offset)
        if flags & 0xFF != CHARSXP:
            raise InvalidTaskDataError("R data: a character vector holds something else")
        offset += 8
        if length == MISSING_LENGTH:
            strings.append("")
            continue
        strings.append(entry[offset : offset + length].decode("utf-8", errors="replace"))
        offset += length
    return strings
