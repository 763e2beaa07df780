"""Folders that data sets are read from and written to: local ones and prefixes in S3, with one interface."""

import errno
import io
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol
from urllib.parse import unquote_to_bytes, urlsplit

from pipelines.clients.local_files import is_below, open_local_file
from services.core.errors import ConfigurationError, NotFound, OutsideFolder
from services.core.s3 import Bucket, s3_client
from services.core.s3_uri import parse_s3_uri
from services.core.settings import Settings

_NO_HARD_LINK_ERRORS: Final = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_READ_AHEAD_BYTES: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A file in a folder."""

    name: str
    """The path relative to the folder, with slashes."""
    size: int


class Folder(Protocol):
    """A folder of files. Every method raises StoreUnavailable if the store does not answer."""

    @property
    def uri(self) -> str:
        """The URI of the folder, without a slash at the end."""

    def entries(self, below: str = "") -> Iterator[Entry]:
        """All files in a subfolder, sorted by name; none if it does not exist."""

    def read(self, name: str) -> bytes | None:
        """The content of a file; None if it does not exist."""

    def open(self, name: str) -> BinaryIO:
        """Open a file to read and seek. Its content cannot change while it is open.

        Raises NotFound, Forbidden, or ObjectChanged while reading.
        """

    def create(self, name: str, data: bytes) -> bool:
        """Write a new file, whole or not at all. Returns False if it exists already."""

    def put(self, name: str, data: bytes) -> None:
        """Write a file, whole or not at all, or replace the existing one."""

    def remove(self, below: str) -> None:
        """Remove all files in a subfolder."""

    def uri_of(self, name: str) -> str:
        """The URI of a file."""


def open_folder(location: str, settings: Settings, root: Path | None = None) -> Folder:
    """The folder at a path, a file:// URI or an s3:// URI.

    `root`: links in a folder of this machine may also point to files below this one.

    Raises:
        ConfigurationError: the location is none of these.
    """
    if location.startswith("s3://"):
        try:
            bucket, prefix = parse_s3_uri(location)
        except ValueError:
            raise ConfigurationError(f"{location!r} names no bucket; write s3://bucket/prefix") from None
        client = s3_client(
            settings.s3_endpoint,
            connect_timeout=5,
            read_timeout=60,
            retries={"mode": "standard", "max_attempts": 6},
        )
        return BucketFolder(Bucket(client, bucket), prefix.strip("/"))
    return LocalFolder(local_path(location), root)


def local_path(location: str) -> Path:
    """The absolute path of a path or a file:// URI.

    Raises:
        ConfigurationError: the location is neither.
    """
    if location.startswith("file://"):
        parts = urlsplit(location)
        if parts.netloc not in ("", "localhost"):
            raise ConfigurationError(f"{location} names another machine; write file:///path")
        return Path(os.fsdecode(unquote_to_bytes(parts.path)))
    if "://" in location:
        raise ConfigurationError(f"{location} is neither a path nor an s3:// URI")
    return Path(location).absolute()


class LocalFolder:
    """A folder of this machine. Links in it are followed, but not to files outside of it."""

    def __init__(self, path: Path, root: Path | None = None) -> None:
        """`root`: links may also point to files below this folder."""
        self.path = path
        self._roots = (path, root) if root else (path,)

    @property
    def uri(self) -> str:
        return self.path.as_uri()

    def entries(self, below: str = "") -> Iterator[Entry]:
        yield from self._walk(self.path / below)

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        return open_below(self.path / name, self._roots)

    def create(self, name: str, data: bytes) -> bool:
        file = self.path / name
        draft = self._write_draft(file, data)
        try:
            os.link(draft, file)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_HARD_LINK_ERRORS:
                raise
            # The file system has no hard links. A rename is atomic, too, but could overwrite a file created just now.
            if file.exists():
                return False
            draft.replace(file)
        finally:
            draft.unlink(missing_ok=True)
        return True

    def put(self, name: str, data: bytes) -> None:
        file = self.path / name
        self._write_draft(file, data).replace(file)

    def remove(self, below: str) -> None:
        for entry in list(self.entries(below)):
            (self.path / entry.name).unlink(missing_ok=True)
        folders = sorted((f for f in (self.path / below).rglob("*") if f.is_dir()), reverse=True)
        for each in [*folders, self.path / below]:
            with suppress(OSError):
                each.rmdir()

    def uri_of(self, name: str) -> str:
        return (self.path / name).as_uri()

    def _walk(self, path: Path) -> Iterator[Entry]:
        try:
            children = sorted(os.scandir(path), key=lambda child: child.name)
        except (FileNotFoundError, NotADirectoryError):
            return
        except PermissionError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        for child in children:
            if child.is_dir(follow_symlinks=False):
                yield from self._walk(Path(child.path))
            else:
                size = 0  # of a link that is broken or points outside: reading it reports the error
                if not child.is_symlink() or is_below(Path(child.path), self._roots):
                    with suppress(OSError):
                        size = child.stat().st_size
                yield Entry(Path(child.path).relative_to(self.path).as_posix(), size)

    def _write_draft(self, file: Path, data: bytes) -> Path:
        """Write the content under a temporary name in the same folder, and sync it to disk."""
        # Another process that finishes the same run removes empty folders, so the folder may have to be made again.
        file.parent.mkdir(parents=True, exist_ok=True)
        draft = file.with_name(f".{file.name}.{uuid.uuid4().hex[:12]}")
        with draft.open("xb") as output:
            output.write(data)
            output.flush()
            os.fsync(output.fileno())
        return draft


def open_below(file: Path, roots: Sequence[Path]) -> BinaryIO:
    """Open a file of a data set. Raises as `open_local_file`."""
    try:
        return open_local_file(file, roots)
    except OutsideFolder as error:
        raise OutsideFolder(f"{error}; allow another folder with --root") from None


class BucketFolder:
    """A prefix in a bucket."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""

    @property
    def uri(self) -> str:
        return self._bucket.uri(self._prefix).rstrip("/")

    def entries(self, below: str = "") -> Iterator[Entry]:
        for found in self._bucket.entries(self._prefix + (f"{below}/" if below else "")):
            name = found.key.removeprefix(self._prefix)
            if name and not name.endswith("/"):
                yield Entry(name, found.size)

    def read(self, name: str) -> bytes | None:
        try:
            return self._bucket.read(self._prefix + name)
        except NotFound:
            return None

    def open(self, name: str) -> BinaryIO:
        key = self._prefix + name
        return io.BufferedReader(_Ranged(self._bucket, key, *self._bucket.head(key)), _READ_AHEAD_BYTES)

    def create(self, name: str, data: bytes) -> bool:
        return self._bucket.create(self._prefix + name, data)

    def put(self, name: str, data: bytes) -> None:
        self._bucket.put(self._prefix + name, data)

    def remove(self, below: str) -> None:
        self._bucket.delete_each([self._prefix + entry.name for entry in self.entries(below)])

    def uri_of(self, name: str) -> str:
        return self._bucket.uri(self._prefix + name)


class _Ranged(io.RawIOBase):
    """An object in S3 as a file. It is read by ranges, all of the same ETag."""

    def __init__(self, bucket: Bucket, key: str, size: int, etag: str) -> None:
        super().__init__()
        self._bucket = bucket
        self._key = key
        self._size = size
        self._etag = etag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        last = min(self._position + len(buffer), self._size) - 1
        if last < self._position:
            return 0
        data = self._bucket.read(self._key, byte_range=f"bytes={self._position}-{last}", etag=self._etag)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
