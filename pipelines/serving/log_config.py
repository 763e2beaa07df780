"""What Ray Serve's own loggers write: warnings, and no line for each request."""

from typing import Final

from ray.serve.schema import LoggingConfig

LOGGING_CONFIG: Final = LoggingConfig(log_level="WARNING", enable_access_log=False)
