"""Shared by all tests: the servers, how parallel runs are divided, and the settings of Hypothesis."""

from typing import Final

import hypothesis
import pytest

pytest_plugins = [
    "tests.support.model_hub",
    "tests.support.nvidia",
    "tests.support.servers",
    "tests.support.s3_server",
    "tests.support.redis_attacks",
    "tests.support.streams_bench",
    "tests.support.intake_bench",
    "tests.support.command_line",
    "tests.support.engine",
]

# A busy machine is no fault of the code: no example has a deadline, and slow generation is no error.
hypothesis.settings.register_profile("sluice", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("sluice")

_GROUPS: Final = {
    "service": {"end_to_end"},
    "ray": {"ray", "scripted"},
    "engine": {"engine"},
    "servers": {"server", "kafka", "valkey_url", "kafka_address", "outage_broker", "s3_endpoint", "streams", "served"},
}
"""Groups of tests by markers, fixtures and the folder end_to_end. A test is in the first group that fits."""

_FIXTURES_WITH_MARKS: Final = {
    "engine": {"engine"},
    "kafka": {"kafka_address", "outage_broker"},
    "ray": {"cluster", "scripted"},
}
"""Tests that use one of the fixtures have the mark, so that `-m "not ray"` and the like leave all of them out."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test that needs a server, and name the group that `--dist loadgroup` keeps on one worker.

    A worker starts the servers of its session once, so the tests of a group share them. pytest-xdist reads the groups
    before any `pytest_collection_modifyitems` of a conftest could set them.
    """
    fixtures = set(getattr(item, "fixturenames", ()))
    if getattr(getattr(item, "callspec", None), "params", {}).get("streams") == "memory":
        fixtures.discard("streams")
    needs = {mark.name for mark in item.iter_markers()} | fixtures | ({"end_to_end"} & {item.path.parent.name})
    for mark, fixtures_of_mark in _FIXTURES_WITH_MARKS.items():
        if fixtures & fixtures_of_mark and item.get_closest_marker(mark) is None:
            raise pytest.UsageError(f"{item.nodeid} needs the mark {mark}: it uses {fixtures & fixtures_of_mark}")
    group = next((name for name, members in _GROUPS.items() if members & needs), None)
    if group:
        item.add_marker(pytest.mark.server)
        item.add_marker(pytest.mark.xdist_group(group))
