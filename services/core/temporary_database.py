"""Opens temporary SQLite databases for data that may not fit into memory."""

import sqlite3
from collections.abc import Sequence


def open_temporary_database(tables: Sequence[str], *, cache_kib: int) -> sqlite3.Connection:
    """Open a database in a file without a name, with tables such as `outcomes (key, id)`.

    The file disappears with the process. It is in SQLITE_TMPDIR, else in TMPDIR. There is no journal, and SQLite does
    not wait for the disk, so an aborted transaction cannot be rolled back.

    Raises:
        sqlite3.Error: the file cannot be written.
    """
    database = sqlite3.connect("", isolation_level=None)
    for statement in (
        "PRAGMA journal_mode = OFF",
        "PRAGMA synchronous = OFF",
        "PRAGMA temp_store = FILE",
        f"PRAGMA cache_size = -{cache_kib}",
        *(f"CREATE TABLE {table}" for table in tables),
    ):
        database.execute(statement)
    return database
