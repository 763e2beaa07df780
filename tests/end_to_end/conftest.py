"""The service that the tests of this folder share: `sluice up --embedded`, with nothing else set but limits."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.corpus import IMAGE_LIMIT_BYTES
from tests.end_to_end.outside import STOP_S, Service

_DRAIN_S = 20


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service. Ctrl-C ends it in time after the last test, and its log has no traceback."""
    limits = {"SLUICE_IMAGE_LIMIT_BYTES": str(IMAGE_LIMIT_BYTES), "SLUICE_DRAIN_S": str(_DRAIN_S)}
    service = Service(tmp_path_factory.mktemp("service"), "--embedded", environment=limits)
    try:
        service.wait_until_ready()
        yield service
        service.interrupt(_DRAIN_S + STOP_S)
        assert "Traceback" not in service.log.read_text()
    finally:
        service.kill()
