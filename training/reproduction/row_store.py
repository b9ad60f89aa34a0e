"""Finished rows of a table: one JSON file, written anew after each row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import InvalidRecipeError
from training.checkpoint import write_text

StoredRow = dict[str, Any]


@dataclass(frozen=True)
class RowStore:
    """`table-N.json` of a folder.

    Attributes:
        folder: of the results of all tables.
        table: its number.
        head: what all rows share: recipe, base, data. Rows of another head are another table.
    """

    folder: Path
    table: int
    head: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """The table's file."""
        return table_path(self.folder, self.table)

    def read(self) -> list[StoredRow]:
        """Finished rows.

        Raises:
            InvalidRecipeError: the file holds rows of another recipe, base or data.
        """
        document = read_table(self.folder, self.table)
        if document is None:
            return []
        for name, value in json.loads(json.dumps(dict(self.head))).items():
            if document.get(name) != value:
                raise InvalidRecipeError(
                    f"{self.path} holds rows of another {name}: choose another --out, or delete it"
                )
        rows: list[StoredRow] = document["rows"]
        return rows

    def find(self, key: str) -> StoredRow | None:
        """The row of a key in this table, else in another one of the same head."""
        for path in (self.path, *sorted(self.folder.glob("table-*.json"))):
            document = _read(path) or {}
            if document.get("recipe_digest") != self.head["recipe_digest"]:
                continue
            for row in document.get("rows", ()):
                if row["key"] == key:
                    return dict(row)
        return None

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row and writes the file."""
        document = {"table": self.table, **self.head, "rows": [*self.read(), dict(row)]}
        write_text(self.path, json.dumps(document, indent=1) + "\n")


def table_path(folder: Path, table: int) -> Path:
    """Where a table's JSON lies."""
    return folder / f"table-{table}.json"


def read_table(folder: Path, table: int) -> dict[str, Any] | None:
    """A table's JSON; None where nothing was measured yet."""
    return _read(table_path(folder, table))


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return document
