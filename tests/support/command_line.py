"""Run `sluice` commands: in the process of the test, or as a child process in a folder of its own.

A child process imports the whole stack again for each command, so prefer `run_sluice` and `run_sluice_in`.
"""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Final
from unittest import mock

import pytest

from pipelines.cli.main import main
from pipelines.local.env_file import keep_env_file
from tests.support.intake_bench import IntakeBench

SLUICE: Final = str(Path(sys.executable).with_name("sluice"))


def run_sluice(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run one command through the entry point of the `sluice` script, and return what a shell would see of it.

    Not for `sluice up`, which installs signal handlers, nor inside a running event loop.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sluice", *arguments]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        mock.patch.dict(os.environ),  # the command adds the settings in .sluice/env
        redirect_stdout(stdout),
        redirect_stderr(stderr),
    ):
        try:
            main()
        except SystemExit as exit_:
            status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        else:
            status = 0
    return subprocess.CompletedProcess(["sluice", *arguments], status, stdout.getvalue(), stderr.getvalue())


def run_sluice_in(
    folder: Path, *arguments: str, stdin: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command in `folder`, with no setting in its environment but `variables`.

    The command has a thread of its own, because the test may have an event loop. It blocks that loop, as a shell would.
    """
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    with (
        chdir(folder),
        mock.patch.dict(os.environ, inherited | variables, clear=True),
        ThreadPoolExecutor(1) as thread,
    ):
        done = thread.submit(run_sluice, *arguments, stdin=stdin).result()
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.encode(), done.stderr.encode())


def start_sluice(
    *arguments: str, folder: Path, stdin: bytes = b"", **variables: str
) -> subprocess.CompletedProcess[bytes]:
    """Run one command as a child process in `folder`. `variables` are added to its environment."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SLUICE_")}
    return subprocess.run(
        [SLUICE, *arguments], cwd=folder, input=stdin, capture_output=True, check=False, env=inherited | variables
    )


def assert_fails(result: subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Assert that the command failed with a message that has these words, and without a traceback."""
    message = result.stderr.decode()
    assert result.returncode != 0
    assert "Traceback" not in message
    assert all(word in message for word in words), message


@pytest.fixture
def folder(bench: IntakeBench, tmp_path: Path) -> Iterator[Path]:
    """A folder whose .sluice/env has the settings of the bench."""
    file = tmp_path / ".sluice" / "env"
    with keep_env_file(bench.settings, {}, file):
        yield tmp_path
