"""Fixtures of the gateway's tests."""

from tests.support.gateway_bench import bench, idle, preparer

__all__ = ["bench", "idle", "preparer"]
