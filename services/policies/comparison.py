"""Compares two policy versions."""

import difflib
from collections.abc import Iterator

from services.policies.document import PolicyDocument
from services.policies.document_yaml import write_document
from services.policies.reference import PolicyReference
from services.policies.registry import PolicyRegistry, StoredVersion


def diff_versions(before: PolicyReference, after: PolicyReference, registry: PolicyRegistry) -> Iterator[str]:
    """The lines of two unified diffs: first of the documents, then of the prompts that they make.

    Raises:
        UnknownPolicy: a version does not exist, or a policy has no active version.
    """
    old, new = registry.find(before), registry.find(after)
    for part, text in (("document", _document), ("prompt", _prompt)):
        yield from difflib.unified_diff(
            text(old).splitlines(), text(new).splitlines(), f"{before} ({part})", f"{after} ({part})", lineterm=""
        )


def _document(stored: StoredVersion) -> str:
    return write_document(stored.document, version=0, digest="")


def _prompt(stored: StoredVersion) -> str:
    return stored.document.prompt() if isinstance(stored.document, PolicyDocument) else ""
