"""The deployment files name only settings that exist."""

import re
from pathlib import Path
from typing import Final

import pytest

from services.core.settings import Settings
from tests.support.deployment_files import INFRA, ROOT, deployment_files

SETTINGS: Final = {f"SLUICE_{name.upper()}" for name in Settings.model_fields}
FILES: Final = sorted(deployment_files())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_deployment_file_names_only_existing_settings(path: Path) -> None:
    named = set(re.findall(r"\bSLUICE_(?!TEST_)[A-Z0-9_]*[A-Z0-9]\b", path.read_text(encoding="utf-8")))

    assert named <= SETTINGS


def test_compose_file_is_searched_for_settings() -> None:
    assert INFRA / "compose.yaml" in FILES
    assert "SLUICE_" in (INFRA / "compose.yaml").read_text(encoding="utf-8")
