"""The conditions of `--filter`: `rating=Safe,score<0.2`. All of them have to hold.

    filter     condition {"," condition}
    condition  field operator value
    field      rating | category | action | outcome | score
    operator   = | !=                     the value may be several, with | between them: category=O2|O3
             | < | <= | > | >=            for score only

A category is written as its code (`O2`, `NA`) or in full. A row without a value for a field meets no condition on it.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, get_args

from services.core.errors import ConfigurationError
from services.core.values import Action, Rating

_CONDITION: Final = re.compile(r"\s*([a-z]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_NEXT: Final = re.compile(r",(?=\s*[a-z]+\s*(?:!=|<=|>=|=|<|>))")
"""Names of categories have commas in them; a comma that a condition follows is between conditions."""
_CODE: Final = re.compile(r"O[1-9]\d*|NA")
_VALUES: Final = {
    "rating": get_args(Rating),
    "action": get_args(Action),
    "outcome": ("verdict", "needs_review", "dead_letter"),
}
_COMPARED: Final[dict[str, Callable[[float, float], bool]]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_FIELDS: Final = ("rating", "category", "action", "outcome", "score")


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the conditions."""

    field: str
    operator: str
    values: tuple[str, ...]

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row with this field meets it."""
        value = row[self.field]
        if value is None:
            return False
        if self.field == "score":
            return _COMPARED[self.operator](value, float(self.values[0]))
        found = value in self.values
        if self.field == "category":
            found = found or value.partition(":")[0] in self.values
        return found == (self.operator == "=")


@dataclass(frozen=True, slots=True)
class Filter:
    """What to keep of the annotations."""

    conditions: tuple[Condition, ...]
    text: str

    @property
    def fields(self) -> list[str]:
        """What it looks at."""
        return sorted({condition.field for condition in self.conditions})

    def keeps(self, row: dict[str, Any]) -> bool:
        """Whether a row with those fields meets every condition."""
        return all(condition.holds(row) for condition in self.conditions)


def parse(text: str) -> Filter:
    """Read a filter.

    Raises:
        ConfigurationError: it is none; the sentence says what is wrong with which condition.
    """
    return Filter(tuple(map(_condition, _NEXT.split(text))), text)


def _condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigurationError(
            f"--filter: {text.strip()!r} is no condition; write field, operator, value, such as rating=Safe"
        )
    field, sign, value = match.groups()
    if field not in _FIELDS:
        raise ConfigurationError(f"--filter: there is no field {field!r}; there are {', '.join(_FIELDS)}")
    if field == "score":
        return Condition(field, sign, (_score(value),))
    if sign not in ("=", "!="):
        raise ConfigurationError(f"--filter: {field} has no order, so {sign} means nothing; write = or !=")
    values = tuple(each.strip() for each in value.split("|"))
    for each in values:
        if field == "category":
            if not _CODE.fullmatch(each.partition(":")[0]):
                raise ConfigurationError(f"--filter: {each!r} is no category; write its code, such as O2, or NA")
        elif each not in _VALUES[field]:
            raise ConfigurationError(f"--filter: {field} is never {each!r}; it is {' or '.join(_VALUES[field])}")
    return Condition(field, sign, values)


def _score(value: str) -> str:
    try:
        score = float(value)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise ConfigurationError(f"--filter: {value!r} is no score; scores are numbers from 0 to 1")
    return value
