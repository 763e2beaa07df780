"""Coverage-guided fuzzing of the message formats: python -m tests.fuzz.guided -runs=N [libFuzzer options]."""

import sys

import atheris

with atheris.instrument_imports(include=["services.streams.parsing", "services.core.messages"]):
    from tests.fuzz.run import keep, parsed


def one(data: bytes) -> None:
    """One case; a find ends the run."""
    wrong = parsed(data)
    if wrong:
        raise RuntimeError(f"{keep('formats', data)}: {wrong}")


atheris.Setup(sys.argv, one)
atheris.Fuzz()
