"""What a reference in a list of strangers may stand for: an object in S3, or a file below one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.annotation.schema import Row
from pipelines.annotation.storage import local_path
from services.core.errors import ConfigurationError, Forbidden, Malformed
from services.core.messages import Submission, id_of


@dataclass(frozen=True, slots=True)
class References:
    """Reads references relative to the folder of their list."""

    place: str
    """The folder of the list, a URI; relative references are relative to it."""
    root: Path | None
    """Files outside of this folder are not read; None: no files at all."""

    def row(self, reference: Any, own: dict[str, Any]) -> Row:
        """The row of one reference, not read yet. `own` are the columns that a submission has, too.

        Raises:
            Malformed: it is no reference.
            Forbidden: it leads out of the folder.
        """
        if not isinstance(reference, str) or not reference:
            raise Malformed("the row has no reference")
        text = {name: value for name, value in own.items() if isinstance(value, str) and value}
        uri, place = self._resolved(reference)
        given = own.get("id")
        name = text.get("id") or (str(given) if isinstance(given, int) else "") or (uri if place else "")
        row = {
            "id": id_of(name),
            "uri": uri,
            "version_id": text.get("version_id"),
            "etag": text.get("etag"),
            "tenant": text.get("tenant", "default"),
            "place": place,
        }
        if place is None:
            # What can be submitted on the stream is what counts as well-formed here.
            Submission.parse({k: v for k, v in row.items() if k != "place"} | {"id": name or "none"})
        return row

    def _resolved(self, reference: str) -> tuple[str, Row | None]:
        """The URI, and of a file its place."""
        scheme = urlsplit(reference).scheme if "://" in reference else ""
        if scheme == "s3":
            return reference, None
        if scheme not in ("", "file"):
            raise Malformed(f"{scheme}:// is never fetched; put the images into a bucket or a folder first")
        if not scheme and not reference.startswith("/") and self.place.startswith("s3://"):
            if not {"..", "."}.isdisjoint(reference.split("/")):
                raise Forbidden(f"{reference!r} leads out of the folder of its list")
            return f"{self.place}/{reference}", None
        return self._local(reference, scheme)

    def _local(self, reference: str, scheme: str) -> tuple[str, Row]:
        if self.root is None:
            raise Forbidden("a list in S3 may not name files of this machine; allow a folder by --root")
        try:
            path = local_path(reference) if scheme else local_path(self.place) / reference
            path, root = path.resolve(), self.root.resolve()
        except (ConfigurationError, OSError, RuntimeError, ValueError) as error:
            raise Malformed(f"{reference!r} is no path: {error}") from None
        if not path.is_relative_to(root):
            raise Forbidden(f"{reference!r} leads out of {root}; allow another folder by --root")
        return path.as_uri(), {"file": path.as_uri(), "offset": 0, "size": None, "group": None, "etag": None}
