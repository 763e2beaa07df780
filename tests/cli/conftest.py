"""The gateway for the tests of `sluice keys`."""

from tests.support.gateway_bench import idle, preparer

__all__ = ["idle", "preparer"]
