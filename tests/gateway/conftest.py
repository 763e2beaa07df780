"""The gateway of these tests."""

from tests.support.gateway_bench import bench, idle, preparer

__all__ = ["bench", "idle", "preparer"]
