"""The configuration of Ray Serve's own loggers: warnings only, no access log."""

from typing import Final

from ray.serve.schema import LoggingConfig

LOGGING_CONFIG: Final = LoggingConfig(log_level="WARNING", enable_access_log=False)
