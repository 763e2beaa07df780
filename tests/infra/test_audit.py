"""`make audit`: pip-audit on a lock, with a vulnerability service of the test or none."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.deployment_files import ROOT

SCRIPT: Final = ROOT / "infra" / "audit.py"
LOCK: Final = f"idna==3.4 \\\n    --hash=sha256:{'0' * 64}\nh11==0.16.0 \\\n    --hash=sha256:{'1' * 64}\n    # via x\n"


class Osv:
    """A server with the interface of OSV. Without `known`, it answers with errors."""

    def __init__(self, known: dict[str, list[dict[str, Any]]] | None) -> None:
        self.asked: list[str] = []
        osv = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = query["package"]["name"]
                osv.asked.append(f"{name} {query['version']}")
                body = json.dumps({"vulns": known[name]} if known and name in known else {}).encode()
                self.send_response(503 if known is None else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1/query"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "some.lock"
    file.write_text(LOCK)
    return file


@pytest.fixture
def vulnerable() -> Iterator[Osv]:
    affected = {
        "package": {"name": "h11", "ecosystem": "PyPI"},
        "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "0.17.0"}]}],
    }
    osv = Osv({"h11": [{"id": "GHSA-x", "aliases": ["CVE-2026-1"], "summary": "bad", "affected": [affected]}]})
    yield osv
    osv.server.shutdown()


def run(lock: Path, url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(lock), "--service", "osv", "--osv-url", url, "--timeout", "5"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=150)


def test_known_vulnerability_is_listed_with_status_1(lock: Path, vulnerable: Osv) -> None:
    done = run(lock, vulnerable.url)

    assert done.returncode == 1, done.stderr
    assert "h11 0.16.0: CVE-2026-1, GHSA-x; fixed in 0.17.0" in done.stdout
    assert "2 packages checked, 1 known vulnerabilities" in done.stdout
    assert set(vulnerable.asked) == {"idna 3.4", "h11 0.16.0"}


def test_lock_without_known_vulnerabilities_ends_with_status_0(lock: Path) -> None:
    osv = Osv({})
    try:
        done = run(lock, osv.url)
    finally:
        osv.server.shutdown()

    assert (done.returncode, done.stdout) == (0, "2 packages checked, 0 known vulnerabilities\n"), done.stderr


@pytest.mark.parametrize("is_listening", [True, False])
def test_service_that_is_away_is_one_sentence_and_status_3(lock: Path, is_listening: bool) -> None:
    osv = Osv(None)
    if not is_listening:
        osv.server.server_close()
    try:
        done = run(lock, osv.url)
    finally:
        osv.server.shutdown()

    assert done.returncode == 3
    assert done.stdout.count("\n") == 1
    assert "was not checked for known vulnerabilities, because OSV cannot be asked from here" in done.stdout
    assert len(osv.asked) <= 1, "a service that is away is not asked for every package"


def test_audit_reads_the_lock_that_is_installed() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "infra/audit.py" in makefile
    assert 'ROOT / "requirements.lock"' in SCRIPT.read_text(encoding="utf-8")
