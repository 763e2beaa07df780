"""Reads and writes `.sluice/env`, which tells the commands in a folder how to reach the service started there.

The service keeps a lock on the file while it runs, and the commands use only a locked file. So a file that came with
the folder, for example in an archive, cannot send the commands to somebody else's service: an unpacked file has the
mode of the original and the owner who unpacks it, but no lock.
"""

import fcntl
import logging
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.core.errors import ConfigurationError
from services.core.settings import Settings

ENV_FILE: Final = Path(".sluice/env")
_CLIENT_VARIABLES: Final = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "RAY_AUTH_MODE"),
    *("SLUICE_GATEWAY_URL", "SLUICE_API_KEY"),
)
_OMITTED_SETTINGS: Final = {"kafka_options"}
"""A shell that reads the file would remove the quotes from JSON. The user sets these in the environment."""
_VARIABLES: Final = frozenset(
    {f"SLUICE_{name.upper()}" for name in Settings.model_fields.keys() - _OMITTED_SETTINGS} | set(_CLIENT_VARIABLES)
)
"""All variables that the file may set."""
_MODE: Final = 0o600
_LIMIT_BYTES: Final = 256 << 10
"""Lists of buckets, prefixes and revisions have far fewer bytes."""
_REMEDY: Final = "remove the file, or run this in another folder"

log = logging.getLogger(__name__)


def read_env_file(file: Path = ENV_FILE) -> dict[str, str]:
    """Return the variables in the file; none if there is no file, or if no running service keeps it.

    The folder may come from somebody else, for example with a repository or an archive, some variables run programs,
    and others say where images are sent to. Therefore the file is used only if it is as `keep_env_file` writes it, and
    only while `keep_env_file` runs.

    Raises:
        ConfigurationError: the file cannot be read, others own it or have access to it, or it sets other variables.
    """
    try:
        content = open(file, "rb", opener=_open_descriptor)  # noqa: SIM115 - the with statement below closes it
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be read ({error.strerror}); run this as the user who runs `sluice up`, or in another folder"
        ) from None
    with content:
        status = os.fstat(content.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{file} cannot be read, because it is not a plain file; {_REMEDY}")
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != _MODE:
            raise ConfigurationError(
                f"{file} is not used, because `sluice up` writes a file of mode 0600 that belongs to you, and this one "
                f"belongs to the user {status.st_uid} and has mode {stat.S_IMODE(status.st_mode):04o}; {_REMEDY}"
            )
        is_kept = _is_locked(content.fileno())
        text = content.read(_LIMIT_BYTES + 1)
        if len(text) > _LIMIT_BYTES:
            raise ConfigurationError(f"{file} is not used, because it has more than {_LIMIT_BYTES:,} bytes; {_REMEDY}")
        lines = text.decode(errors="replace").splitlines()
    variables = dict(line.split("=", 1) for line in lines if "=" in line)
    if foreign := sorted(variables.keys() - _VARIABLES):
        raise ConfigurationError(
            f"{file} is not used, because it sets {foreign[0]!r}, which `sluice up` never writes; {_REMEDY}"
        )
    if not is_kept:
        log.warning(
            "%s is ignored, because no running `sluice up` keeps it: the service was killed, or the file came from "
            "somebody else. Only the variables of the environment count. Start the service here, or remove the file.",
            file,
        )
        return {}
    return variables


@contextmanager
def keep_env_file(settings: Settings, variables: Mapping[str, str], file: Path = ENV_FILE) -> Iterator[None]:
    """Keep the settings in `file` while the block runs. Only its owner can read the file.

    Of `variables`, the file also gets the credentials of the embedded backends, the gateway's URL and key, and the
    authentication mode of Ray.

    The lock on the file disappears with this process, also if the process is killed.
    """
    values = settings.model_dump(mode="json", exclude_none=True, exclude=_OMITTED_SETTINGS)
    lines = [f"SLUICE_{name.upper()}={','.join(v) if isinstance(v, list) else v}" for name, v in values.items()]
    lines += [f"{name}={variables[name]}" for name in _CLIENT_VARIABLES if name in variables]
    content = "\n".join(lines) + "\n"

    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE), "w", encoding="utf-8") as output:
        output.write(content)
        output.flush()
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            log.warning("%s cannot be locked (%s), so commands in this folder will not use it", file, error.strerror)
        draft.replace(file)
        try:
            yield
        finally:
            # A service that was started later in the same folder has replaced the file by its own.
            if file.exists() and file.read_text(encoding="utf-8") == content:
                file.unlink()


def _is_locked(descriptor: int) -> bool:
    """Whether a process keeps its exclusive lock on the file."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no locks
        pass
    return False


def _open_descriptor(path: str, flags: int) -> int:
    """Open without following a link, and without waiting for the other end of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
