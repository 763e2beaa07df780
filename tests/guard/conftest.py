from tests.guard_engine import engine  # noqa: F401
