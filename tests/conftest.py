"""What all tests share: servers, and a second try for those that use them."""

import pytest

pytest_plugins = [
    "tests.support.servers",
    "tests.support.s3_server",
    "tests.support.streams_bench",
    "tests.support.intake_bench",
    "tests.support.engine",
]

_SERVERS = {"valkey_url", "kafka_address", "s3_endpoint", "streams", "served"}
_MARKS = {"kafka", "engine", "slow"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers and engines share the machine with whatever else runs there: a test of them that fails is run once more.

    The summary names those that needed it.
    """
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        if _SERVERS & set(getattr(item, "fixturenames", ())) or _MARKS & marks or "end_to_end" in item.nodeid:
            item.add_marker(pytest.mark.flaky(reruns=1))
