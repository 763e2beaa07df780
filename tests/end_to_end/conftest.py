"""The service that the tests of this folder share: `sluice up --embedded`, with nothing else set but limits."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.corpus import IMAGE_LIMIT_BYTES
from tests.end_to_end.outside import STOP_S, Service

_DRAIN_S = 20
_TRAPS = (
    "services",
    "pipelines",
    "moto",
    "sglang",
    "multiprocessing",
    "pandas",
    "numpy",
    "json",
    "ray",
    "sitecustomize",
)
"""Modules in the folder of the service, as in a hostile archive. No process may import them."""


@pytest.fixture(scope="package")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A running service. Ctrl-C ends it in time after the last test, and its log has no traceback."""
    limits = {"SLUICE_IMAGE_LIMIT_BYTES": str(IMAGE_LIMIT_BYTES), "SLUICE_DRAIN_S": str(_DRAIN_S)}
    folder = tmp_path_factory.mktemp("service")
    for name in _TRAPS:
        (folder / f"{name}.py").write_text(
            f"open({str(folder / 'imported')!r}, 'a').write({name!r} + ' ')\nraise ImportError\n"
        )
    service = Service(folder, "--embedded", environment=limits)
    try:
        service.wait_until_ready()
        yield service
        service.interrupt(_DRAIN_S + STOP_S)
        assert "Traceback" not in service.log.read_text()
        assert not (folder / "imported").exists(), (folder / "imported").read_text()
    finally:
        service.kill()
