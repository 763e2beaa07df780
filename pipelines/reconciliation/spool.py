"""What `sluice reconcile` has read, on disk, so that memory does not grow with the streams.

It is one of SQLite's temporary databases: it has no name, and is gone with the process. Its file lies in SQLITE_TMPDIR,
else TMPDIR, and takes some 300 bytes for each submission with its end, twice that while they are sorted.
"""

import sqlite3
from collections.abc import Iterator
from typing import Any, Final, Self

from pipelines.reconciliation.matching import SeenSubmission, SubmissionOutcome

_BATCH: Final = 5_000
_CACHE_KIB: Final = 32_768


class SpoolDatabase:
    """Occurrences and ends, in any order in, in the order of their keys out. To be used as a context manager.

    Every method raises sqlite3.Error where the file cannot be written.
    """

    _OCCURRENCES: Final = tuple(SeenSubmission.__slots__)
    _ENDS: Final = tuple(SubmissionOutcome.__slots__)

    def __enter__(self) -> Self:
        self._database = sqlite3.connect("", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode = OFF",
            "PRAGMA synchronous = OFF",
            "PRAGMA temp_store = FILE",
            f"PRAGMA cache_size = -{_CACHE_KIB}",
            f"CREATE TABLE occurrences ({', '.join(self._OCCURRENCES)})",
            f"CREATE TABLE ends ({', '.join(self._ENDS)})",
        ):
            self._database.execute(statement)
        self._new: dict[str, list[tuple[Any, ...]]] = {"occurrences": [], "ends": []}
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add_occurrence(self, occurrence: SeenSubmission) -> None:
        """Keep a submission."""
        self._add("occurrences", tuple(getattr(occurrence, name) for name in self._OCCURRENCES))

    def add_end(self, end: SubmissionOutcome) -> None:
        """Keep a verdict or a dead letter."""
        self._add("ends", tuple(getattr(end, name) for name in self._ENDS))

    def occurrences(self) -> Iterator[SeenSubmission]:
        """In the order of their keys."""
        for row in self._sorted("occurrences"):
            yield SeenSubmission(*row)

    def ends(self) -> Iterator[SubmissionOutcome]:
        """In the order of their keys."""
        for row in self._sorted("ends"):
            yield SubmissionOutcome(*row)

    def _add(self, table: str, row: tuple[Any, ...]) -> None:
        self._new[table].append(row)
        if len(self._new[table]) >= _BATCH:
            self._flush(table)

    def _flush(self, table: str) -> None:
        rows = self._new[table]
        if rows:
            self._database.execute("BEGIN")
            self._database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
            self._database.execute("COMMIT")
            rows.clear()

    def _sorted(self, table: str) -> Iterator[Any]:
        self._flush(table)
        return self._database.execute(f"SELECT * FROM {table} ORDER BY key")
