"""A Hugging Face hub on this machine: the few answers that fetching files needs."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants


class Hub(http.server.BaseHTTPRequestHandler):
    """Files of one repository, the same in every revision.

    Attributes:
        repository: its id; ``""``: whichever is asked for.
        files: by name, as long as they are asked for.
        commit: of every revision; ``""``: that of its own name.
        asked: paths, in order.
    """

    repository: str
    files: Mapping[str, bytes]
    commit: str
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(self.path)
        *_, revision, name = self.path.split("/")
        content = self.files.get(name) if self.path.startswith(f"/{self.repository}") else None
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("X-Repo-Commit", self.commit or revision)
        if content is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        else:
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if body and content is not None:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        """Stay quiet."""


@contextmanager
def local_hub(
    monkeypatch: pytest.MonkeyPatch, cache: Path, files: Mapping[str, bytes], repository: str = "", commit: str = ""
) -> Iterator[type[Hub]]:
    """Let huggingface_hub ask a hub on this machine, which has these files, and keep them in ``cache``."""
    Hub.files, Hub.repository, Hub.commit, Hub.asked = files, repository, commit, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield Hub
        server.shutdown()
        thread.join()
