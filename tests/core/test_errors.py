"""errors.py defines the whole hierarchy, and its docstring shows it."""

import ast
import inspect
from pathlib import Path
from typing import Final, get_args

import pytest

from services.core import errors
from services.core.errors import DeadLetterReason, SluiceError, Unjudgeable

ROOT: Final = Path(__file__).parents[2]
HIERARCHY: Final = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, SluiceError) and value.__module__ == errors.__name__
}


@pytest.mark.parametrize("name", HIERARCHY)
def test_docstring_tree_shows_every_error(name: str) -> None:
    assert name in (errors.__doc__ or "").replace(",", "").split()


def test_errors_are_defined_in_one_module() -> None:
    elsewhere = set()
    for folder in ("services", "pipelines"):
        for file in (ROOT / folder).rglob("*.py"):
            if file == ROOT / "services" / "core" / "errors.py":
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") in HIERARCHY for base in node.bases):
                    elsewhere.add(node.name)
    assert elsewhere == {"HttpProblem"}


def test_every_dead_letter_reason_has_one_error() -> None:
    kinds = [error for error in HIERARCHY.values() if issubclass(error, Unjudgeable) and error is not Unjudgeable]
    reasons = sorted(error.reason for error in kinds if "reason" in vars(error))  # others inherit theirs
    assert reasons == sorted(get_args(DeadLetterReason))
