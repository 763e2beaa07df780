"""The import path that 0.1.0 had for the autoscaling policy in Serve's configuration files."""

from pipelines.autoscaling.serve_policy import BacklogScaling

__all__ = ["BacklogScaling"]
