"""Resolves the references in a list to objects in S3, or to files below one folder. A list is not trusted."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.annotation.image_row import FileLocation, ImageRow
from pipelines.annotation.storage import local_path
from services.core.errors import ConfigurationError, Forbidden, Malformed
from services.core.messages import Submission, make_submission_id


@dataclass(frozen=True, slots=True)
class ReferenceResolver:
    """Resolves the references of one list."""

    folder_uri: str
    """The folder of the list. Relative references are relative to it."""
    root: Path | None
    """The folder whose files the list may name; None if it may name no files."""

    def resolve(self, reference: Any, columns: Mapping[str, Any]) -> ImageRow:
        """The row of a reference; the image is not read yet.

        `columns` are the other columns of its line or row. `id`, `version_id`, `etag` and `tenant` have the meaning
        that they have in a submission.

        Raises:
            Malformed: the reference is not valid.
            Forbidden: the reference is outside of the folder.
        """
        if not isinstance(reference, str) or not reference:
            raise Malformed("the row has no reference")
        text = {name: value for name, value in columns.items() if isinstance(value, str) and value}
        uri, place = self._resolve(reference)
        number = columns.get("id")
        name = text.get("id") or (str(number) if isinstance(number, int) else "") or (uri if place else "")
        row = ImageRow(
            id=make_submission_id(name),
            uri=uri,
            version_id=text.get("version_id"),
            etag=text.get("etag"),
            tenant=text.get("tenant", "default"),
            place=place,
        )
        if place is None:
            # A reference to an object has to be valid as a submission, too.
            Submission.parse(
                {
                    "id": name or "none",
                    "uri": row.uri,
                    "version_id": row.version_id,
                    "etag": row.etag,
                    "tenant": row.tenant,
                }
            )
        return row

    def _resolve(self, reference: str) -> tuple[str, FileLocation | None]:
        """The URI of a reference, and the location of a file."""
        scheme = urlsplit(reference).scheme if "://" in reference else ""
        if scheme == "s3":
            return reference, None
        if scheme not in ("", "file"):
            raise Malformed(f"{scheme}:// is never fetched; put the images into a bucket or a folder first")
        if not scheme and not reference.startswith("/") and self.folder_uri.startswith("s3://"):
            if not {"..", "."}.isdisjoint(reference.split("/")):
                raise Forbidden(f"{reference!r} points outside the folder of its list")
            return f"{self.folder_uri}/{reference}", None
        return self._resolve_file(reference, scheme)

    def _resolve_file(self, reference: str, scheme: str) -> tuple[str, FileLocation]:
        if self.root is None:
            raise Forbidden("a list in S3 may not name files of this machine; allow a folder with --root")
        try:
            path = local_path(reference) if scheme else local_path(self.folder_uri) / reference
            path, root = path.resolve(), self.root.resolve()
        except (ConfigurationError, OSError, RuntimeError, ValueError) as error:
            raise Malformed(f"{reference!r} is not a path: {error}") from None
        if not path.is_relative_to(root):
            raise Forbidden(f"{reference!r} points outside {root}; allow another folder with --root")
        return path.as_uri(), FileLocation(path.as_uri())
