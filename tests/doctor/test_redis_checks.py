"""The parts of the checks of Redis that take facts: what a server reports of itself."""

from typing import Any

import pytest

from pipelines.doctor.redis_checks import check_eviction, check_persistence, check_release


@pytest.mark.parametrize(
    ("facts", "is_ok", "words"),
    [
        ({"aof_enabled": 1}, True, "append-only file is on"),
        ({"aof_enabled": 1, "aof_last_write_status": "err"}, False, "make room on the server's disk"),
        ({"aof_enabled": 0, "save": "3600 1"}, True, "snapshots are on"),
        (
            {"aof_enabled": 0, "save": "3600 1", "rdb_last_bgsave_status": "err"},
            False,
            "make room on the server's disk",
        ),
        ({"aof_enabled": 0, "save": None}, True, "the server hides `save`"),
        ({"aof_enabled": 0, "save": ""}, False, "loses all its data, and it is needed"),
        ({}, True, "may not run INFO"),
    ],
)
def test_persistence(facts: dict[str, Any], is_ok: bool, words: str) -> None:
    result = check_persistence("redis persistence", facts, "it is needed")

    assert result.is_ok is is_ok
    assert words in result.detail


def test_persistence_that_nothing_needs_may_be_off() -> None:
    assert check_persistence("redis persistence", {"aof_enabled": 0, "save": ""}, "").is_ok


@pytest.mark.parametrize(("policy", "is_ok"), [("noeviction", True), ("volatile-lru", False), ("allkeys-lfu", False)])
def test_eviction(policy: str, is_ok: bool) -> None:
    assert check_eviction("redis eviction", {"maxmemory_policy": policy}).is_ok is is_ok


@pytest.mark.parametrize(("release", "is_ok"), [("6.0.16", False), ("6.2.0", True), ("7.4.1", True), ("10.0", True)])
def test_release(release: str, is_ok: bool) -> None:
    assert check_release({"redis_version": release}).is_ok is is_ok
