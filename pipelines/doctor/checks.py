"""What a check is: its name, the settings that it needs, and its results."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from services.core.settings import Settings


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The line of one check."""

    check: str
    is_ok: bool
    detail: str
    """What was found, or what is wrong and what to do."""

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
    """Blocks. If it raises one of Sluice's errors, the next check has failed, and the later ones have not run."""
    needs: tuple[str, ...] = ()
    """The fields of the settings without which it cannot run."""
    is_local: bool = False
    """It asks only this machine, so it is fast."""
    blocks_start: bool = False
    """If it fails, `sluice up` cannot become ready, so `sluice up` stops at once."""


def passed(check: str, detail: str) -> CheckResult:
    return CheckResult(check, True, detail)


def failed(check: str, detail: str) -> CheckResult:
    return CheckResult(check, False, detail)
