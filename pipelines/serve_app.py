"""The import path that 0.1.0 had for the application in Serve's configuration files."""

from pipelines.serving.build import build

__all__ = ["build"]
