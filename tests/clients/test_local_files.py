"""Attacks by the author of a folder, while its files are opened."""

import os
from pathlib import Path
from typing import Any

import pytest

from pipelines.clients.local_files import open_local_file
from services.core.errors import Forbidden, OutsideFolder


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder of somebody else, beside a folder of the user with a file of the same name."""
    for name in ("private", "foreign/inner"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.png").write_text(name)
    return tmp_path / "foreign"


def test_folder_that_becomes_a_link_before_its_file_is_opened_is_refused(
    foreign: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, inner, opening = foreign.parent / "private", foreign / "inner", os.open

    def swap_and_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        inner.rename(foreign / "moved")
        inner.symlink_to(private)
        monkeypatch.setattr(os, "open", opening)
        return opening(path, flags, *arguments, **options)

    monkeypatch.setattr(os, "open", swap_and_open)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OutsideFolder, match="private"):
        open_local_file(inner / "a.png", [foreign])
    assert len(os.listdir("/proc/self/fd")) == before
    with open_local_file(foreign / "moved/a.png", [foreign]) as file:
        assert file.read() == b"foreign/inner"


def test_hard_link_is_a_file_of_its_folder(foreign: Path) -> None:
    """The file system does not say which of its names is the first. Who makes a hard link must own or may write it."""
    os.link(foreign.parent / "private/a.png", foreign / "hard.png")
    with open_local_file(foreign / "hard.png", [foreign]) as file:
        assert file.read() == b"private"


def test_pipe_is_refused_at_once(foreign: Path) -> None:
    os.mkfifo(foreign / "pipe")
    with pytest.raises(Forbidden, match="not a plain file"):
        open_local_file(foreign / "pipe", [foreign])
