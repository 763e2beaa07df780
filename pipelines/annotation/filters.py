"""Filters of annotations, such as `rating=Safe,score<0.2`: a row has to meet all conditions.

    filter     condition {"," condition}
    condition  field operator value
    field      rating | category | action | outcome | score
    operator   = | !=                     several values are separated by |: category=O2|O3
             | < | <= | > | >=            only for score

A category is written as its code (`O2`, `NA`) or in full. A row without a value meets no condition on that field.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, get_args

from services.core.errors import ConfigurationError
from services.core.values import Action, Rating

DEAD_LETTER: Final = "dead_letter"
"""The outcome of an image that can never be judged."""

_CONDITION: Final = re.compile(r"\s*([a-z]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)
_SEPARATOR: Final = re.compile(r",(?=\s*[a-z]+\s*(?:!=|<=|>=|=|<|>))")
"""A comma separates conditions only if a condition follows, because names of categories have commas, too."""
_CATEGORY_CODE: Final = re.compile(r"O[1-9]\d*|NA")
_VALUES: Final = {
    "rating": get_args(Rating),
    "action": get_args(Action),
    "outcome": ("verdict", "needs_review", DEAD_LETTER),
}
_OPERATORS: Final[dict[str, Callable[[float, float], bool]]] = {
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
    """A condition on one field."""

    field: str
    operator: str
    values: tuple[str, ...]

    def holds(self, row: dict[str, Any]) -> bool:
        """Whether a row with this field meets the condition."""
        value = row[self.field]
        if value is None:
            return False
        if self.field == "score":
            return _OPERATORS[self.operator](value, float(self.values[0]))
        found = value in self.values
        if self.field == "category":
            found = found or value.partition(":")[0] in self.values
        return found == (self.operator == "=")


@dataclass(frozen=True, slots=True)
class Filter:
    """Conditions that select annotations."""

    conditions: tuple[Condition, ...]
    text: str

    @property
    def fields(self) -> list[str]:
        """The fields that the conditions are about."""
        return sorted({condition.field for condition in self.conditions})

    def keeps(self, row: dict[str, Any]) -> bool:
        """Whether a row with these fields meets every condition."""
        return all(condition.holds(row) for condition in self.conditions)


def parse_filter(text: str) -> Filter:
    """Parse the text of a filter.

    Raises:
        ConfigurationError: a condition is not valid; the message names it.
    """
    return Filter(tuple(map(_parse_condition, _SEPARATOR.split(text))), text)


def _parse_condition(text: str) -> Condition:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise ConfigurationError(
            f"--filter: {text.strip()!r} is not a condition; write field, operator and value, such as rating=Safe"
        )
    field, sign, value = match.groups()
    if field not in _FIELDS:
        raise ConfigurationError(f"--filter: there is no field {field!r}; the fields are {', '.join(_FIELDS)}")
    if field == "score":
        return Condition(field, sign, (_check_score(value),))
    if sign not in ("=", "!="):
        raise ConfigurationError(f"--filter: {field} has no order, so {sign} cannot be used; write = or !=")
    values = tuple(each.strip() for each in value.split("|"))
    for each in values:
        if field == "category":
            if not _CATEGORY_CODE.fullmatch(each.partition(":")[0]):
                raise ConfigurationError(f"--filter: {each!r} is not a category; write a code, such as O2 or NA")
        elif each not in _VALUES[field]:
            raise ConfigurationError(f"--filter: {field} is never {each!r}; write {' or '.join(_VALUES[field])}")
    return Condition(field, sign, values)


def _check_score(value: str) -> str:
    try:
        score = float(value)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise ConfigurationError(f"--filter: {value!r} is not a score; write a number from 0 to 1")
    return value
