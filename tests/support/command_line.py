"""Runs `sluice` in the process of the test: a child process would import the whole stack again for each command."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest import mock

from pipelines.cli.main import main


def run_sluice(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one command through the entry point of the `sluice` script, and return what a shell would see of it.

    Not for `sluice up`, which installs signal handlers, nor inside a running event loop.
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["sluice", *arguments]),
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
