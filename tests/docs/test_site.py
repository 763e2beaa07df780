"""The documentation: generated pages are current, and every link and anchor leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest
from pydantic import BaseModel

from services.core.settings import Settings
from services.policies.document import PolicyDocument
from services.policies.tenants import TenantsDocument

ROOT: Final = Path(__file__).parents[2]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)


def test_generated_pages_are_current() -> None:
    checked = _run("docs/generate.py", "--check")

    assert checked.returncode == 0, checked.stderr


def test_glossary_has_at_most_twenty_terms() -> None:
    rows = [line for line in (ROOT / "docs" / "glossary.md").read_text().splitlines() if line.startswith("| ")]
    assert len(rows[1:]) <= 20  # the first row is the head


def test_every_setting_has_a_description() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("document", [PolicyDocument, TenantsDocument])
def test_every_field_of_a_document_has_a_description(document: type[BaseModel]) -> None:
    schema = document.model_json_schema()
    models = [schema, *schema.get("$defs", {}).values()]

    assert [
        name for model in models for name, field in model["properties"].items() if not field.get("description")
    ] == []


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = _run("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site"))

    assert built.returncode == 0, built.stderr


@pytest.mark.parametrize("target", ["nowhere.md", "glossary.md#nowhere"])
def test_dead_link_fails_the_build(tmp_path: Path, target: str) -> None:
    pages = tmp_path / "docs"
    pages.mkdir()
    (pages / "index.md").write_text(f"# Page\n\n[link]({target}) [glossary](glossary.md)\n")
    (pages / "glossary.md").write_text("# Glossary\n")
    configuration = (ROOT / "mkdocs.yml").read_text().partition("nav:\n  - Overview")[0]
    (tmp_path / "mkdocs.yml").write_text(configuration)

    built = _run("-m", "mkdocs", "build", "--strict", "--config-file", str(tmp_path / "mkdocs.yml"))

    assert built.returncode != 0
    assert "nowhere" in built.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_of_root_pages_lead_to_existing_files(name: str) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text(encoding="utf-8"))

    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_page_names_the_debian_packages_that_ci_installs(page: str) -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    packages = re.findall(r"packages\+=\((\S+)\)", script)

    assert len(packages) == 3
    assert [package for package in packages if f"`{package}`" not in (ROOT / page).read_text(encoding="utf-8")] == []
