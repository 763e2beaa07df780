"""From a record of a data set to a labelled image: what the fields may be called, and what is refused. Pure.

Understood are plain records (image, rating, and where known category and policy) and those of LlavaGuard's data set:
there the policy of a row is known by the prompt in its conversation or by the suffix of its id. `_v2` waives the
violated category, so that the label becomes Safe; `_v3` waives one to three others, which only its prompt names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pipelines.annotation.sources.discover import REFERENCE_COLUMNS
from services.core.values import CATEGORIES, NO_CATEGORY, Rating

Reason = Literal[
    "malformed", "no_image", "too_large", "bad_rating", "unknown_category", "unknown_policy", "contradiction"
]
Image = Path | str | bytes
"""A file, an s3:// reference, or the bytes themselves."""

_IMAGE: Final = (*REFERENCE_COLUMNS, "image_bytes")
_RATING: Final = ("rating", "safety_rating", "expected_rating", "expected", "label")
_CATEGORY: Final = ("category", "safety_category")
_POLICY: Final = ("policy", "augmentation", "policy_id")
_ID: Final = ("id", "image_id")
COLUMNS: Final = frozenset((*_IMAGE, *_RATING, *_CATEGORY, *_POLICY, *_ID, "waived", "conversations"))
"""Every field that is looked at."""
_RATINGS: Final[dict[str, Rating]] = {
    "safe": "Safe",
    "unsafe": "Unsafe",
    "compliant": "Safe",
    "review needed": "Unsafe",
}
"""In small letters; the last two are those of the data set's first releases."""
_CODES: Final = {category.partition(":")[0]: category for category in CATEGORIES}
_CODE: Final = re.compile(r"\s*(O\d{1,3}|NA|10)\b(?!\.)", re.I)
_OF_NO_CATEGORY: Final = {"NA", "10"}
"""The first releases counted `10: None applying`."""
_AUGMENTATION: Final = re.compile(r"v(\d)(?:_[a-z])?")
_SUFFIX: Final = re.compile(r"_(v\d(?:_[a-z])?)$")
_WAIVED: Final = re.compile(r"Category (O\d{1,3}) is declared as non-violating")
_PLAIN: Final = {"", "default policy", "none", "v0"}
_POLICY_LIMIT: Final = 80
"""Characters of a reference; what is longer is a prompt."""
_DETAIL_LIMIT: Final = 80


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A labelled image, and the policy that its label is about."""

    id: str
    image: Image
    rating: Rating
    category: str | None
    """Full name where it is one of LlavaGuard's, else its code alone; None where the label names none."""
    policy: str | None = None
    """`name` or `name@7`; None for the policy that is evaluated."""
    waived: frozenset[str] = frozenset()
    """Codes of the categories that are waived on top of what the policy says."""


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """A record that is no labelled image."""

    id: str
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """Stands for a record that could not be decoded."""

    detail: str


class _RejectRecord(Exception):
    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse(record: Any, number: int, folder: Path) -> LabelledImage | RejectedRecord:
    """The labelled image of one record.

    Args:
        record: a decoded record.
        number: of the record in its data set, from 1 on; its id where it has none.
        folder: what relative paths of images begin at.
    """
    name = f"row-{number}"
    try:
        if isinstance(record, UnreadableRecord):
            raise _RejectRecord("malformed", record.detail)
        if not isinstance(record, Mapping):
            raise _RejectRecord("malformed", "is no object with fields")
        name = str(_first(record, _ID) or name).encode(errors="replace").decode()[:256]
        return _sample(record, name, folder)
    except _RejectRecord as refused:
        return RejectedRecord(name, refused.reason, str(refused))


def code_of(category: str) -> str:
    """Such as O2 of `O2: Violence, Harm, or Cruelty`."""
    return category.partition(":")[0]


def _sample(record: Mapping[str, Any], name: str, folder: Path) -> LabelledImage:
    prompt, label = _conversation(record)
    rating = _rating(label.get("rating") or _first(record, _RATING))
    category = _category(label.get("category") or _first(record, _CATEGORY))
    if rating == "Unsafe" and category == NO_CATEGORY:
        raise _RejectRecord("contradiction", "is labelled Unsafe and of no category")
    policy, waived = _policy(record, name, prompt, category)
    return LabelledImage(name, _image(record, folder), rating, category, policy, waived)


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _conversation(record: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The prompt, and the answer that was trained, of a record that has a conversation."""
    turns = record.get("conversations")
    if turns is None:
        return None, {}
    try:
        prompt, answer = (turn["value"] for turn in turns[:2])
        label = json.loads(answer) if isinstance(answer, str) else answer
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _RejectRecord("malformed", "its conversation has no prompt with a JSON answer") from None
    if not isinstance(prompt, str) or not isinstance(label, Mapping):
        raise _RejectRecord("malformed", "its conversation has no prompt with a JSON answer")
    return prompt, label


def _rating(value: Any) -> Rating:
    found = _RATINGS.get(value.strip().lower()) if isinstance(value, str) else None
    if found is None:
        raise _RejectRecord("bad_rating", f"its rating is {_shown(value)}, neither Safe nor Unsafe")
    return found


def _category(value: Any) -> str | None:
    if value is None or value == "":
        return None
    match = _CODE.match(value) if isinstance(value, str) else None
    if match is None:
        raise _RejectRecord(
            "unknown_category", f"its category is {_shown(value)}, which begins with no code such as O2"
        )
    code = match[1].upper()
    return NO_CATEGORY if code in _OF_NO_CATEGORY else _CODES.get(code, code)


def _policy(
    record: Mapping[str, Any], name: str, prompt: str | None, category: str | None
) -> tuple[str | None, frozenset[str]]:
    """The policy by name, and the categories that are waived on top of it."""
    reference = _first(record, _POLICY)
    waived = frozenset(map(_waived_code, _listed(record.get("waived"))))
    if reference is not None and not isinstance(reference, str):
        raise _RejectRecord("unknown_policy", f"its policy is {_shown(reference)}, which is no text")
    if prompt is None and reference is not None and ("\n" in reference or len(reference) > _POLICY_LIMIT):
        prompt, reference = reference, None
    if prompt is not None:
        return reference, waived | frozenset(_WAIVED.findall(prompt))
    suffix = _SUFFIX.search(name)
    if reference is None:
        reference = suffix[1] if suffix and not waived else ""
    augmentation = _AUGMENTATION.fullmatch(reference.strip())
    if reference.strip().lower() in _PLAIN:
        return None, waived
    if augmentation is None:
        return reference.strip(), waived
    if augmentation[1] == "2" and category not in (None, NO_CATEGORY):
        return None, waived | {code_of(str(category))}
    raise _RejectRecord(
        "unknown_policy", f"its augmentation {reference} does not say which categories are waived; its prompt would"
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else []


def _waived_code(value: Any) -> str:
    category = _category(value)
    if category is None or category == NO_CATEGORY:
        raise _RejectRecord("unknown_category", f"waives {_shown(value)}, which is no category")
    return code_of(category)


def _image(record: Mapping[str, Any], folder: Path) -> Image:
    value = _first(record, _IMAGE)
    if isinstance(value, Mapping):  # as Hugging Face stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray) and value:
        return bytes(value)
    if not isinstance(value, str) or not value or "\0" in value or value != value.encode(errors="replace").decode():
        raise _RejectRecord("no_image", "names no image")
    if value.startswith("s3://"):
        return value
    if re.match(r"[a-z]+://", value, re.I):
        raise _RejectRecord("no_image", f"its image is {_shown(value)}; addresses other than s3:// are never fetched")
    return folder / value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _DETAIL_LIMIT else f"{text[:_DETAIL_LIMIT]}..."
