"""The log: untrusted text can neither begin a line nor control a terminal."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from services.core.logs import configure_logging, escape_unconfigured_log

KEY = "cat.jpg\n12:34:56 ERROR CIRCUIT BREAKER: all open\r\x1b[41m\x1b]0;owned\x07\x9b2J\u2028\u202e.jpg"


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> logging.Logger:
    """A logger without the handlers of pytest."""
    monkeypatch.setattr(logging.root, "handlers", [])
    return logging.getLogger("services.test_logs")


def assert_one_line(text: str) -> None:
    assert text.endswith("\n")
    assert text[:-1].isprintable(), text
    assert "cat.jpg\ufffd12:34:56 ERROR" in text


@pytest.fixture
def read_log(log: logging.Logger, tmp_path: Path) -> Callable[[], str]:
    configure_logging(tmp_path / "log")
    return (tmp_path / "log").read_text


def test_hostile_object_key_stays_in_its_line(log: logging.Logger, read_log: Callable[[], str]) -> None:
    log.info("submission s3://uploads/%s cannot be judged", KEY)
    assert_one_line(read_log())


def test_hostile_text_in_a_traceback_begins_no_line(log: logging.Logger, read_log: Callable[[], str]) -> None:
    try:
        raise ValueError(KEY)
    except ValueError:
        log.exception("a defect at %s", KEY)
    first, *more = read_log().splitlines()
    assert_one_line(f"{first}\n")
    assert any("CIRCUIT BREAKER" in line for line in more), "the exception is in the log"
    for line in more:
        assert line.startswith("  ")
        assert line.isprintable(), line


def test_warning_in_a_command_stays_in_its_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last_resort = logging.lastResort
    assert last_resort is not None
    monkeypatch.setattr(last_resort, "formatter", None)
    escape_unconfigured_log()
    last_resort.handle(logging.makeLogRecord({"msg": "the API key of %s is refused", "args": (KEY,)}))
    assert_one_line(capsys.readouterr().err)
