"""Fixtures of the tests for images."""

from tests.s3_server import s3_endpoint

__all__ = ["s3_endpoint"]
