"""Check requirements.lock for known vulnerabilities with pip-audit. `make audit` runs it.

The vulnerabilities come from PyPI's JSON API, or from OSV if that does not answer. Exit status:

    0   every package was checked, and none has a known vulnerability
    1   some packages have known vulnerabilities; they are listed
    3   not every package could be checked, because the services do not answer or do not know it
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

FOUND = 1
UNCHECKED = 3
ROOT = Path(__file__).parents[1]
SERVICES = {"pypi": "PyPI", "osv": "OSV"}


@dataclass
class Audit:
    """What one service knows."""

    vulnerabilities: list[str] = field(default_factory=list)
    """One line for each."""
    checked: int = 0
    unchecked: list[str] = field(default_factory=list)
    """Names of packages."""


def audit(lock: Path, service: str, options: list[str]) -> Audit | None:
    """The result of pip-audit for one lock; None if the service does not answer."""
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--require-hashes", "--disable-pip"]
    command += ["--vulnerability-service", service, "--format", "json", "--progress-spinner", "off", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return None
    found = Audit()
    for each in dependencies:
        if "skip_reason" in each:
            found.unchecked.append(each["name"])
            continue
        found.checked += 1
        for known in each["vulns"]:
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            names = ", ".join([known["id"], *known["aliases"]])
            found.vulnerabilities.append(f"{each['name']} {each['version']}: {names}; fixed in {fixed}")
    return found


def answers(lock: Path, service: str, options: list[str]) -> bool:
    """Whether the service knows the first package of the lock. So a service that is away gets one request only."""
    first = re.split(r"\n(?=\S)", lock.read_text(encoding="utf-8"))[0]
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / "first.lock"
        probe.write_text(first + "\n", encoding="utf-8")
        result = audit(probe, service, options)
    return result is not None and result.checked > 0


def main() -> int:
    """Print the result, and return the exit status."""
    parser = argparse.ArgumentParser(description="Check a lock for known vulnerabilities.")
    parser.add_argument("lock", nargs="?", type=Path, default=ROOT / "requirements.lock")
    parser.add_argument("--service", action="append", choices=SERVICES, help="try only these; may be repeated")
    arguments, options = parser.parse_known_args()
    services = arguments.service or list(SERVICES)
    result = None
    for service in services:
        if answers(arguments.lock, service, options):
            result = audit(arguments.lock, service, options)
        if result is not None:
            break
    if result is None:
        names = " and ".join(SERVICES[service] for service in services)
        print(
            f"{arguments.lock.name} was not checked for known vulnerabilities, because {names} cannot be asked from "
            "here; run `make audit` on a machine with internet"
        )
        return UNCHECKED
    for line in result.vulnerabilities:
        print(line)
    if result.unchecked:
        print(
            f"{SERVICES[service]} does not know these packages, so they were not checked: {', '.join(result.unchecked)}"
        )
    print(f"{result.checked} packages checked, {len(result.vulnerabilities)} known vulnerabilities")
    if result.vulnerabilities:
        return FOUND
    return UNCHECKED if result.unchecked else 0


if __name__ == "__main__":
    sys.exit(main())
