"""Parses the records of a data set into labelled images, and rejects the others with a reason. Pure.

Two kinds of records are supported: plain ones (image, rating, and optionally category and policy), and those of
LlavaGuard's data set. There the prompt in the conversation, or the suffix of the id, defines the policy of a row: `_v2`
waives the violated category, so the label becomes Safe; `_v3` waives one to three others, which only the prompt names.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from pipelines.annotation.sources.discover import REFERENCE_COLUMNS
from services.core.values import CATEGORIES, NO_CATEGORY, Rating

RejectionReason = Literal[
    "malformed",
    "no_image",
    "too_large",
    "not_an_image",
    "bad_rating",
    "unknown_category",
    "unknown_policy",
    "contradiction",
]
Image = Path | str | bytes
"""A file, an s3:// reference, or the bytes themselves."""

_IMAGE_FIELDS: Final = (*REFERENCE_COLUMNS, "image_bytes")
_RATING_FIELDS: Final = ("rating", "safety_rating", "expected_rating", "expected", "label")
_CATEGORY_FIELDS: Final = ("category", "safety_category")
_POLICY_FIELDS: Final = ("policy", "augmentation", "policy_id")
_ID_FIELDS: Final = ("id", "image_id")
RECORD_FIELDS: Final = frozenset(
    (*_IMAGE_FIELDS, *_RATING_FIELDS, *_CATEGORY_FIELDS, *_POLICY_FIELDS, *_ID_FIELDS, "waived", "conversations")
)
"""Every field that is read."""
_RATINGS: Final[dict[str, Rating]] = {
    "safe": "Safe",
    "unsafe": "Unsafe",
    "compliant": "Safe",
    "review needed": "Unsafe",
}
"""In lower case. The last two are those of the first releases of LlavaGuard's data set."""
_CATEGORIES_BY_CODE: Final = {category.partition(":")[0]: category for category in CATEGORIES}
_CATEGORY_CODE: Final = re.compile(r"\s*(O\d{1,3}|NA|10)\b(?!\.)", re.I)
_NO_CATEGORY_CODES: Final = {"NA", "10"}
"""The first releases used `10: None applying`."""
_AUGMENTATION: Final = re.compile(r"v(\d)(?:_[a-z])?")
_AUGMENTATION_SUFFIX: Final = re.compile(r"_(v\d(?:_[a-z])?)$")
_WAIVED_IN_PROMPT: Final = re.compile(r"Category (O\d{1,3}) is declared as non-violating")
_NO_POLICY: Final = {"", "default policy", "none", "v0"}
_REFERENCE_CHARACTERS: Final = 80
"""The longest reference to a policy. A longer text is a prompt."""
_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """A labelled image, and the policy that its label applies to."""

    id: str
    image: Image
    rating: Rating
    category: str | None
    """The full name of one of LlavaGuard's categories, or the code of another one; None if the label has none."""
    policy: str | None = None
    """`name` or `name@7`; None for the policy that is evaluated."""
    waived: frozenset[str] = frozenset()
    """Codes of the categories that are waived in addition to those of the policy."""


@dataclass(frozen=True, slots=True)
class RejectedRecord:
    """A record that is not a usable labelled image."""

    id: str
    reason: RejectionReason
    detail: str


@dataclass(frozen=True, slots=True)
class UnreadableRecord:
    """Replaces a record that cannot be decoded."""

    detail: str


class _RejectRecord(Exception):
    def __init__(self, reason: RejectionReason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def parse_record(record: Any, number: int, folder: Path) -> LabelledImage | RejectedRecord:
    """Parse one record.

    Args:
        record: a decoded record.
        number: the number of the record in its data set, from 1. It makes the id of a record without one.
        folder: the folder that relative paths of images begin at.
    """
    name = f"row-{number}"
    try:
        if isinstance(record, UnreadableRecord):
            raise _RejectRecord("malformed", record.detail)
        if not isinstance(record, Mapping):
            raise _RejectRecord("malformed", "is not an object with fields")
        name = str(_first(record, _ID_FIELDS) or name).encode(errors="replace").decode()[:256]
        return _parse_fields(record, name, folder)
    except _RejectRecord as refused:
        return RejectedRecord(name, refused.reason, str(refused))


def code_of(category: str) -> str:
    """The code of a category: O2 for `O2: Violence, Harm, or Cruelty`."""
    return category.partition(":")[0]


def _parse_fields(record: Mapping[str, Any], name: str, folder: Path) -> LabelledImage:
    prompt, label = _conversation(record)
    rating = _rating(label.get("rating") or _first(record, _RATING_FIELDS))
    category = _category(label.get("category") or _first(record, _CATEGORY_FIELDS))
    if rating == "Unsafe" and category == NO_CATEGORY:
        raise _RejectRecord("contradiction", "is labelled Unsafe and has no category")
    policy, waived = _policy(record, name, prompt, category)
    return LabelledImage(name, _image(record, folder), rating, category, policy, waived)


def _first(record: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)


def _conversation(record: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]]:
    """The prompt and the trained answer of a record with a conversation."""
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
        raise _RejectRecord("bad_rating", f"its rating is {_display(value)}, neither Safe nor Unsafe")
    return found


def _category(value: Any) -> str | None:
    if value is None or value == "":
        return None
    match = _CATEGORY_CODE.match(value) if isinstance(value, str) else None
    if match is None:
        raise _RejectRecord(
            "unknown_category", f"its category is {_display(value)}, which does not begin with a code such as O2"
        )
    code = match[1].upper()
    return NO_CATEGORY if code in _NO_CATEGORY_CODES else _CATEGORIES_BY_CODE.get(code, code)


def _policy(
    record: Mapping[str, Any], name: str, prompt: str | None, category: str | None
) -> tuple[str | None, frozenset[str]]:
    """The name of the policy, and the categories that are waived in addition."""
    reference = _first(record, _POLICY_FIELDS)
    waived = frozenset(map(_waived_code, _listed(record.get("waived"))))
    if reference is not None and not isinstance(reference, str):
        raise _RejectRecord("unknown_policy", f"its policy is {_display(reference)}, which is not text")
    if prompt is None and reference is not None and ("\n" in reference or len(reference) > _REFERENCE_CHARACTERS):
        prompt, reference = reference, None
    if prompt is not None:
        return reference, waived | frozenset(_WAIVED_IN_PROMPT.findall(prompt))
    suffix = _AUGMENTATION_SUFFIX.search(name)
    if reference is None:
        reference = suffix[1] if suffix and not waived else ""
    augmentation = _AUGMENTATION.fullmatch(reference.strip())
    if reference.strip().lower() in _NO_POLICY:
        return None, waived
    if augmentation is None:
        return reference.strip(), waived
    if augmentation[1] == "2" and category not in (None, NO_CATEGORY):
        return None, waived | {code_of(str(category))}
    raise _RejectRecord(
        "unknown_policy",
        f"its augmentation {reference} does not define the waived categories; add its prompt or the field `waived`",
    )


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, list | tuple) else []


def _waived_code(value: Any) -> str:
    category = _category(value)
    if category is None or category == NO_CATEGORY:
        raise _RejectRecord("unknown_category", f"waives {_display(value)}, which is not a category")
    return code_of(category)


def _image(record: Mapping[str, Any], folder: Path) -> Image:
    value = _first(record, _IMAGE_FIELDS)
    if isinstance(value, Mapping):  # the form in which Hugging Face stores images
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray) and value:
        return bytes(value)
    if not isinstance(value, str) or not value or "\0" in value or value != value.encode(errors="replace").decode():
        raise _RejectRecord("no_image", "has no image")
    if value.startswith("s3://"):
        return value
    if re.match(r"[a-z]+://", value, re.I):
        raise _RejectRecord("no_image", f"its image is {_display(value)}; only s3:// addresses are fetched")
    return folder / value


def _display(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
