"""The output of commands: untrusted text cannot forge lines, control the terminal, or damage JSON and YAML."""

import ast
import json
from pathlib import Path
from typing import Final

import pytest
import yaml

from pipelines.cli import main
from pipelines.cli.output import print_json, print_line, print_lines, print_progress, print_yaml
from pipelines.reporting.timed_progress import TimedProgress

PIPELINES: Final = Path(__file__).parents[2] / "pipelines"
HOSTILE: Final = 'a"\\\n2026-01-01 activate by alice\r\x1b[1A\x1b[2K\x7f\x9b2J\u2028\u202e\U000e0001 ä'


def test_line_is_one_printable_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE)
    print_lines([HOSTILE, "b"])
    lines = capsys.readouterr().out.split("\n")
    assert [len(lines), lines[2:], lines[0]] == [4, ["b", ""], lines[1]]
    assert all(line.isprintable() for line in lines)
    assert lines[0].endswith(" ä")


def test_progress_has_no_control_characters_and_indents_later_lines(capsys: pytest.CaptureFixture[str]) -> None:
    print_progress(f"sluice: {HOSTILE}")
    TimedProgress()(HOSTILE)
    lines = capsys.readouterr().err.split("\n")
    assert all(line.isprintable() for line in lines)
    assert [line.startswith("  2026-01-01 activate by alice") for line in lines] == [False, True, False, True, False]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_is_one_printable_line_with_the_same_content(
    capsys: pytest.CaptureFixture[str], ensure_ascii: bool, indent: int | None
) -> None:
    content = {"why": HOSTILE, HOSTILE: ["plain", 1.5]}
    print_json(json.dumps(content, ensure_ascii=ensure_ascii, indent=indent))
    printed = capsys.readouterr().out
    assert printed.removesuffix("\n").isprintable()
    assert json.loads(printed) == content


def test_yaml_is_printable_with_the_same_content(capsys: pytest.CaptureFixture[str]) -> None:
    print_yaml(yaml.safe_dump({"rule": HOSTILE, "other": ["b"]}, default_style='"', allow_unicode=True, width=10_000))
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    assert yaml.safe_load(printed) == {"rule": HOSTILE, "other": ["b"]}


def test_traceback_of_a_defect_is_printable(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError(HOSTILE)

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as ended:
        main.main()
    lines = capsys.readouterr().err.split("\n")
    assert (ended.value.code, lines[0]) == (1, "Traceback (most recent call last):")
    assert all(line.isprintable() and line.startswith("  ") for line in lines[1:-1])


def test_commands_print_by_the_functions_that_escape() -> None:
    direct = [
        f"{file.name}:{node.lineno}"
        for file in (PIPELINES / "cli").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("typer.echo", "typer.secho", "print")
    ]
    assert {place.partition(":")[0] for place in direct} == {"output.py"}
