"""Documentation, docstrings and comments name only files, modules, settings and commands that exist."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import typer.main
from typer.core import TyperGroup

from pipelines.cli.main import app
from services.core.settings import Settings

ROOT: Final = Path(__file__).parents[2]
FOLDERS: Final = ("docs", "services", "pipelines", "tests", "infra", "benchmarks")
PAGES: Final = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
CHANGES: Final = ROOT / "CHANGELOG.md"
"""Names former modules, so it is searched for settings and commands only."""
OTHER_FILES: Final = [
    ROOT / name for name in ("Makefile", "mkdocs.yml", "pyproject.toml", "ray_cluster.yaml", ".ci/run")
]
GENERATED: Final = {"docs/evaluation/rows.jsonl"}
"""Files that commands write and git ignores."""

PATH: Final = re.compile(r"(?<![\w/.@-])(?:services|pipelines|tests|infra|benchmarks|docs|\.ci)/[\w./-]*\w")
MODULE: Final = re.compile(r"(?<![\w/.])(?:services|pipelines|tests|benchmarks)(?:\.[A-Za-z_]\w*)+(?!\w*\()")
SETTING: Final = re.compile(r"\bSLUICE_[A-Z0-9_]*[A-Z0-9]\b")


@dataclass(frozen=True)
class Text:
    """A line of a page, or a docstring or comment of a module."""

    file: str
    line: int
    text: str


def texts() -> Iterator[Text]:
    for file in [*PAGES, *OTHER_FILES]:
        yield from lines(file)
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix == ".py":
                yield from prose(file)
            elif file.suffix in (".yaml", ".properties", ".xml") or file.name in ("Dockerfile", "README.md"):
                yield from lines(file)


def lines(file: Path) -> Iterator[Text]:
    name = str(file.relative_to(ROOT))
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        yield Text(name, number, line)


def prose(file: Path) -> Iterator[Text]:
    """The docstrings and comments of a module."""
    name, source = str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield Text(name, node.lineno, node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield Text(name, token.start[0], token.string)


def missing_paths(text: str) -> list[str]:
    return [path for path in PATH.findall(text) if path not in GENERATED and not (ROOT / path).exists()]


def missing_modules(text: str) -> list[str]:
    named = [name for name in MODULE.findall(text) if not name.endswith((".md", ".py", ".yaml"))]
    return [name for name in named if not module_or_attribute_exists(name.split("."))]


def module_or_attribute_exists(parts: list[str]) -> bool:
    """Whether the parts name a folder, a module, or a name in a module (at most two levels deep)."""
    for length in range(len(parts), 0, -1):
        path, names = ROOT.joinpath(*parts[:length]), parts[length:]
        module = path.with_suffix(".py")
        if module.exists():
            source = module.read_text(encoding="utf-8")
            return len(names) <= 2 and all(re.search(rf"\b{name}\b", source) for name in names)
        if path.is_dir():
            return not names
    return False


@pytest.mark.parametrize("find", [missing_paths, missing_modules])
def test_text_names_only_existing_files_and_modules(find: Callable[[str], list[str]]) -> None:
    assert [f"{each.file}:{each.line}: {name}" for each in texts() for name in find(each.text)] == []


def test_missing_path_module_and_attribute_are_found() -> None:
    existing = "services/core/errors.py, `services.core.errors.Unavailable`, pipelines.cli.main:main, docs/decisions"

    assert missing_paths(f"{existing}; see services/errors.py") == ["services/errors.py"]
    assert missing_modules(f"{existing}; see `services.errors` and services.core.errors.Nothing") == [
        "services.errors",
        "services.core.errors.Nothing",
    ]


@pytest.mark.parametrize("page", [*PAGES, CHANGES], ids=lambda page: page.name)
def test_page_names_only_existing_settings(page: Path) -> None:
    existing = {f"SLUICE_{name.upper()}" for name in Settings.model_fields}
    # Tests read SLUICE_TEST_... themselves; `up --embedded` writes the other two for clients of the gateway.
    existing |= {"SLUICE_GATEWAY_URL", "SLUICE_API_KEY"}
    named = {name for name in SETTING.findall(page.read_text(encoding="utf-8")) if not name.startswith("SLUICE_TEST_")}

    assert named <= existing


def wrong_commands(text: str) -> list[str]:
    """Commands in the code of a page, with an unknown name or option. Comments behind them may name more options."""
    found = []
    for inline, indented in re.findall(r"`([^`\n]+)`|^ {4}(.+)$", text, flags=re.MULTILINE):
        words = (inline or indented).split()
        starts = [number for number, word in enumerate(words) if word in ("sluice", ".venv/bin/sluice")]
        if not starts or (starts[0] != 0 and words[starts[-1] - 2 : starts[-1]] != ["exec", "sluice"]):
            continue
        command = typer.main.get_command(app)
        for word in words[starts[-1] + 1 :]:
            name = word.strip(",;")
            if isinstance(command, TyperGroup):
                if name not in command.commands:
                    found.append(f"{inline or indented}: no command {name}")
                    break
                command = command.commands[name]
            elif re.fullmatch(r"--[a-z][a-z-]*", name) and not any(name in option.opts for option in command.params):
                found.append(f"{inline or indented}: no option {name}")
    return found


@pytest.mark.parametrize("page", [*PAGES, CHANGES], ids=lambda page: page.name)
def test_page_shows_only_existing_commands_and_options(page: Path) -> None:
    assert wrong_commands(page.read_text(encoding="utf-8")) == []


def test_unknown_command_and_option_are_found() -> None:
    assert (
        wrong_commands("`sluice up --embedded`, `sluice policy check`, `sluice`\n\n    sluice verdicts --follow\n")
        == []
    )
    assert len(wrong_commands("`sluice upp` and `sluice policy chek`\n\n    .venv/bin/sluice up --embeded\n")) == 3
