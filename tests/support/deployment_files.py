"""Read the deployment files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import yaml

ROOT: Final = Path(__file__).parents[2]
INFRA: Final = ROOT / "infra"


def documents(path: Path) -> list[Any]:
    """Every document of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def document(path: Path) -> Any:
    """The only document of a YAML file."""
    (found,) = documents(path)
    return found


def deployment_files() -> Iterator[Path]:
    """Every file for deploying Sluice. Files of the test broker and generated files are left out."""
    yield ROOT / "ray_cluster.yaml"
    yield ROOT / "docs" / "deployment.md"
    for path in sorted(INFRA.rglob("*")):
        if path.is_file() and path.suffix != ".lock" and path.parent.name not in ("schemas", "kafka"):
            yield path
