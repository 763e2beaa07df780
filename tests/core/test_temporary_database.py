"""The temporary SQLite database."""

from pathlib import Path

import pytest

from services.core.temporary_database import open_temporary_database


def test_temporary_database_larger_than_its_cache_is_read_back_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SQLITE_TMPDIR", str(tmp_path))
    database = open_temporary_database(["numbers (n INTEGER, text TEXT)"], cache_kib=64)
    rows = [(number, f"{number:0>1000}") for number in range(2_000)]
    database.executemany("INSERT INTO numbers VALUES (?, ?)", rows)
    assert database.execute("SELECT n, text FROM numbers ORDER BY n").fetchall() == rows
    assert list(tmp_path.iterdir()) == []
    database.close()
