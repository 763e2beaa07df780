"""A hub of models on loopback in place of huggingface.co."""

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import constants
from pydantic_core import to_json

from services.guard.gpu_memory import GIB

MODEL = "AIML-TUDA/LlavaGuard-v1.2-0.5B-OV"
SIGLIP = "google/siglip-so400m-patch14-384"


class Hub:
    """A hub: the files of each repository, and the repositories for which the login is refused."""

    def __init__(self) -> None:
        self.files = {
            MODEL: {"config.json": 1, "model.safetensors": 2 * GIB},
            SIGLIP: {"config.json": 1, "model.safetensors": 3 * GIB},
        }
        """The sizes of the files, by repository."""
        self.refused: dict[str, tuple[int, str]] = {}
        """The status and Hugging Face's code of the error, by repository."""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2]).partition("?")[0]
        if name in self.refused:
            status, code = self.refused[name]
            return status, {"X-Error-Code": code}, b"{}"
        if name not in self.files:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        siblings = [{"rfilename": file, "size": size} for file, size in self.files[name].items()]
        return 200, {}, to_json({"id": name, "sha": "0" * 40, "siblings": siblings})


@pytest.fixture
def model_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback in place of huggingface.co, and an empty local cache."""
    served = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield served
    server.shutdown()
    server.server_close()
