"""Reads the settings for the other checks even if some are wrong."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_settings import SettingsError

from pipelines.doctor.checks import CheckResult, failed, passed
from services.core.settings import NEEDED_BY_WORKERS, Settings

CHECK = "settings"


@dataclass(frozen=True, slots=True)
class ReadSettings:
    """Settings in which every wrong one has its default."""

    settings: Settings
    wrong: Mapping[str, str]
    """What is wrong, by the name of the field."""

    def result(self) -> CheckResult:
        """The line of the settings themselves."""
        problems = [f"{to_variable(name)} is wrong: {problem}" for name, problem in self.wrong.items()]
        # A wrong setting has its default here, which may be empty. It is set, so it is not missing too.
        if missing := [
            to_variable(name)
            for name in NEEDED_BY_WORKERS
            if name not in self.wrong and not getattr(self.settings, name)
        ]:
            problems.append(
                f"{', '.join(missing)} not set: set {'it' if len(missing) == 1 else 'them'} (docs/settings.md), start "
                "everything on this machine with `sluice up --embedded`, or run this command in the folder of the "
                "`sluice up` that runs"
            )
        if problems:
            return failed(CHECK, "; ".join(problems))
        return passed(CHECK, "every setting is valid, and those that a worker needs are set")

    def explain_missing(self, needed: tuple[str, ...]) -> str:
        """Why a check that needs these fields cannot run; empty if it can."""
        for name in needed:
            if name in self.wrong:
                return f"not checked, because {to_variable(name)} is wrong: {self.wrong[name]}; correct it"
            if not getattr(self.settings, name):
                return f"not checked, because {to_variable(name)} is not set; set it"
        return ""


def read_settings() -> ReadSettings:
    """Read the settings from the environment. Use it in a process that has one thread."""
    wrong: dict[str, str] = {}
    while True:
        with _hide_variables(wrong):
            try:
                return ReadSettings(Settings(), wrong)
            except SettingsError:  # only this setting is JSON
                wrong["kafka_options"] = "it is not a JSON object"
            except ValidationError as error:
                for problem in error.errors(include_url=False):
                    wrong[str(problem["loc"][0])] = problem["msg"].removeprefix("Value error, ")


def to_variable(name: str) -> str:
    """The name of the environment variable of a setting."""
    return f"SLUICE_{name.upper()}"


@contextmanager
def _hide_variables(names: Mapping[str, str]) -> Iterator[None]:
    variables = {to_variable(name) for name in names}
    # pydantic-settings reads variables in any case.
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.upper() in variables}
    try:
        yield
    finally:
        os.environ.update(hidden)
