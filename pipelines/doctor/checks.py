"""What a check is: its name, the settings that it needs, and its results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from services.core.settings import Settings

_THIS_MACHINE: Final = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The line of one check."""

    check: str
    is_ok: bool
    detail: str
    """What was found, or what is wrong and what to do."""
    is_skipped: bool = False
    """It was not run, because an earlier check of its probe failed."""

    def to_json(self) -> str:
        return json.dumps({"check": self.check, "ok": self.is_ok, "detail": self.detail})

    def line(self) -> str:
        """One line for people."""
        return f"{'ok   ' if self.is_ok else 'WRONG'}  {self.check:<22} {self.detail}"


@dataclass(frozen=True, slots=True)
class Probe:
    """Checks that look at one thing together, for example over one connection."""

    checks: tuple[str, ...]
    """Their names, in the order in which `run` yields their results."""
    run: Callable[[Settings], Iterator[CheckResult]]
    """Blocks. If it raises one of Sluice's errors, the next check has failed, and the later ones have not run. It may
    also end after a result that failed."""
    needs: tuple[str, ...] = ()
    """The fields of the settings without which it cannot run."""
    is_local: bool = False
    """It asks only this machine, so it is fast."""
    blocks_start: bool = False
    """If it fails, `sluice up` cannot become ready, so `sluice up` stops at once."""


def passed(check: str, detail: str) -> CheckResult:
    return CheckResult(check, True, detail)


def failed(check: str, detail: str) -> CheckResult:
    return CheckResult(check, False, detail.removesuffix("."))


def skipped(check: str, because: str) -> CheckResult:
    """The result of a check that could not run, because the check `because` failed."""
    return CheckResult(check, False, f"not checked, because {because} failed", is_skipped=True)


def runs_elsewhere(settings: Settings) -> bool:
    """Whether the replicas are not, or not only, on this machine."""
    address = settings.ray_address
    return bool(address) and urlsplit(f"//{address}").hostname not in _THIS_MACHINE


def explain_elsewhere(settings: Settings) -> str:
    """The detail of a check of guards that run elsewhere."""
    return f"not checked: guards run on the nodes of {settings.ray_address}; run this command on one of them"
