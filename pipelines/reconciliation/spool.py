"""A temporary database for the messages that `sluice reconcile` has read, so memory does not grow with the streams.

It takes about 300 bytes for each submission with its outcome, and twice that while they are sorted.
"""

from collections.abc import Iterator
from typing import Any, Final, Self

from pipelines.reconciliation.matching import SubmissionMessage, SubmissionOutcome
from services.core.temporary_database import open_temporary_database

_BATCH_ROWS: Final = 5_000
_CACHE_KIB: Final = 32_768


class SpoolDatabase:
    """Submissions and outcomes: added in any order, read sorted by key. A context manager.

    Every method raises sqlite3.Error if the file cannot be written.
    """

    _SUBMISSION_COLUMNS: Final = tuple(SubmissionMessage.__slots__)
    _OUTCOME_COLUMNS: Final = tuple(SubmissionOutcome.__slots__)

    def __enter__(self) -> Self:
        tables = {"submissions": self._SUBMISSION_COLUMNS, "outcomes": self._OUTCOME_COLUMNS}
        self._database = open_temporary_database(
            [f"{name} ({', '.join(columns)})" for name, columns in tables.items()], cache_kib=_CACHE_KIB
        )
        self._unwritten: dict[str, list[tuple[Any, ...]]] = {"submissions": [], "outcomes": []}
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()

    def add_submission(self, submission: SubmissionMessage) -> None:
        """Store a submission."""
        self._add("submissions", tuple(getattr(submission, name) for name in self._SUBMISSION_COLUMNS))

    def add_outcome(self, outcome: SubmissionOutcome) -> None:
        """Store a verdict or a dead letter."""
        self._add("outcomes", tuple(getattr(outcome, name) for name in self._OUTCOME_COLUMNS))

    def submissions(self) -> Iterator[SubmissionMessage]:
        """All submissions, sorted by key."""
        for row in self._sorted_rows("submissions"):
            yield SubmissionMessage(*row)

    def outcomes(self) -> Iterator[SubmissionOutcome]:
        """All outcomes, sorted by key."""
        for row in self._sorted_rows("outcomes"):
            yield SubmissionOutcome(*row)

    def _add(self, table: str, row: tuple[Any, ...]) -> None:
        self._unwritten[table].append(row)
        if len(self._unwritten[table]) >= _BATCH_ROWS:
            self._flush(table)

    def _flush(self, table: str) -> None:
        rows = self._unwritten[table]
        if rows:
            self._database.execute("BEGIN")
            self._database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
            self._database.execute("COMMIT")
            rows.clear()

    def _sorted_rows(self, table: str) -> Iterator[Any]:
        self._flush(table)
        return self._database.execute(f"SELECT * FROM {table} ORDER BY key")
