"""`.sluice/env`: how the commands in one folder find the service that runs there."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from services.core.errors import ConfigurationError
from services.core.settings import Settings

ENV_FILE: Final = Path(".sluice/env")
_OTHERS: Final = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "RAY_AUTH_MODE"),
    *("SLUICE_GATEWAY_URL", "SLUICE_API_KEY"),
)
_NOT_WRITTEN: Final = {"kafka_options"}
"""A shell that reads the file would take the quotes out of JSON. Who runs the commands has it in the environment."""


def read_env_file(file: Path = ENV_FILE) -> dict[str, str]:
    """The variables in the file; none when there is no file.

    Raises:
        ConfigurationError: it cannot be read.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigurationError(
            f"{file} cannot be read ({error.strerror}); be the user who runs `sluice up`, or in another folder"
        ) from None
    return dict(line.split("=", 1) for line in lines if "=" in line)


@contextmanager
def env_file_written(settings: Settings, others: Mapping[str, str], file: Path = ENV_FILE) -> Iterator[None]:
    """Keep the settings in `file`, readable by its owner only, for as long as the block runs.

    `others` are the variables that reach the embedded backends, the gateway and Ray: the credentials of the backends,
    the gateway's URL and key, and Ray's way to authenticate among them are written too, and nothing else.
    """
    values = settings.model_dump(mode="json", exclude_none=True, exclude=_NOT_WRITTEN)
    lines = [f"SLUICE_{name.upper()}={','.join(v) if isinstance(v, list) else v}" for name, v in values.items()]
    lines += [f"{name}={others[name]}" for name in _OTHERS if name in others]
    content = "\n".join(lines) + "\n"

    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}")
    draft.unlink(missing_ok=True)
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as output:
        output.write(content)
    draft.replace(file)
    try:
        yield
    finally:
        # A service started later in the same folder has put its own file there.
        if file.exists() and file.read_text(encoding="utf-8") == content:
            file.unlink()
