"""A small server on this machine that Kaggle's real client takes for Kaggle. Nothing leaves the machine.

The client is told by its own variables to speak plain http to ``http://localhost``, and by ``http_proxy`` to send that
here. Whatever it asks of another host is refused and noted in ``strays``.
"""

from __future__ import annotations

import json
import os
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

USER = "ada"


class KaggleServer:
    """What lies on the server, what was asked of it, and what it is to answer otherwise.

    Attributes:
        address: where it listens, ``http://127.0.0.1:port``.
        kernels: saved versions of each kernel, by ``owner/slug``: the requests' bodies.
        status: of each kernel that was saved; ``RUNNING`` after a push.
        outputs: file name to content of each kernel's last session, with its ``logs``.
        datasets: file name to content of each data set.
        answers: what to answer instead, by method (``SaveKernel``): ``(status, message)``, ``(status, None)`` without
            Kaggle's words, as a proxy answers, a dict that is laid over the usual answer, or ``"stall"``.
        asked: every request as (method, body).
        strays: requests to other hosts.
        page: how many output files one answer holds.
    """

    def __init__(self) -> None:
        self.kernels: dict[str, list[dict[str, Any]]] = {}
        self.status: dict[str, str] = {}
        self.failures: dict[str, str] = {}
        self.outputs: dict[str, dict[str, bytes]] = {}
        self.logs: dict[str, str] = {}
        self.datasets: dict[str, dict[str, bytes]] = {}
        self.answers: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.strays: list[str] = []
        self.page = 2
        self._uploads: dict[str, tuple[str, bytes]] = {}
        self._over = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """Of a process whose client comes here, whoever runs the tests. ``home`` is an empty folder for it."""
        kept = {k: v for k, v in os.environ.items() if not k.upper().startswith("KAGGLE_")}
        return kept | {
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            "KAGGLE_USERNAME": USER,
            "KAGGLE_KEY": "0" * 32,
            "KAGGLE_CONFIG_DIR": str(home / ".kaggle"),
            "HOME": str(home),
            "http_proxy": self.address,
            "HTTP_PROXY": self.address,
            "https_proxy": "http://127.0.0.1:9",
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "all_proxy": "",
            "ALL_PROXY": "",
            "no_proxy": "",
            "NO_PROXY": "",
        }

    def methods(self) -> list[str]:
        return [method for method, _ in self.asked]

    # --- what each method answers: (status, body)

    def answer(self, method: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.asked.append((method, body))
        other = self.answers.get(method)
        if other == "stall":
            self._over.wait(60)
            return 500, {}
        if isinstance(other, tuple):
            return other[0], {} if other[1] is None else {"code": other[0], "message": other[1]}
        usual = getattr(self, f"_{method}", None)
        if usual is None:
            return 404, {"code": 404, "message": f"no method {method}"}
        status, answer = usual(body)
        return status, answer | (other or {})

    def _SaveKernel(self, body):
        name = body["slug"]
        refused = (self.answers.get("SaveKernel") or {}).get("error")
        if not refused:
            self.kernels.setdefault(name, []).append(body)
            self.status[name] = "RUNNING"
        unknown = {
            "invalidDatasetSources": [s for s in body.get("datasetDataSources", []) if s not in self.datasets],
            "invalidKernelSources": [s for s in body.get("kernelDataSources", []) if s not in self.kernels],
        }
        return 200, {
            "ref": f"/code/{name}",
            "url": f"https://www.kaggle.com/code/{name}",
            "versionNumber": len(self.kernels.get(name, ())),
            "kernelId": 7,
            "error": "",
            "invalidTags": [],
            "invalidCompetitionSources": [],
            **unknown,
        }

    def _GetKernelSessionStatus(self, body):
        name = f"{body['userName']}/{body['kernelSlug']}"
        if name not in self.status:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        return 200, {"status": self.status[name], "failureMessage": self.failures.get(name, "")}

    def _ListKernelSessionOutput(self, body):
        name = f"{body['userName']}/{body['kernelSlug']}"
        if name not in self.status:
            return 403, {"code": 403, "message": "Permission 'kernels.get' was denied"}
        files = sorted(self.outputs.get(name, {}))
        first = int(body.get("pageToken") or 0)
        here = files[first : first + self.page]
        quoted = {f: urllib.parse.quote(f"{name}/{f}") for f in here}
        return 200, {
            "files": [{"url": f"http://localhost/output/{quoted[f]}", "fileName": f} for f in here],
            "log": self.logs.get(name, ""),
            "nextPageToken": str(first + self.page) if first + self.page < len(files) else "",
        }

    def _GetDatasetStatus(self, body):
        name = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if name not in self.datasets:
            return 403, {"code": 403, "message": "Permission 'datasets.get' was denied"}
        return 200, {"status": "READY"}

    def _StartBlobUpload(self, body):
        token = f"blob-{len(self._uploads)}"
        self._uploads[token] = (body["name"], b"")
        return 200, {"token": token, "createUrl": f"http://localhost/upload/{token}"}

    def _CreateDataset(self, body):
        name = f"{body['ownerSlug']}/{body['slug']}"
        if not (self.answers.get("CreateDataset") or {}).get("error"):
            self.datasets[name] = dict(self._uploads[file["token"]] for file in body["files"])
        return 200, {"status": "ok", "url": f"https://www.kaggle.com/datasets/{name}", "error": ""}

    def upload(self, token: str, content: bytes) -> None:
        self._uploads[token] = (self._uploads[token][0], content)

    def download(self, path: str) -> bytes | None:
        owner, slug, file = path.split("/", 2)
        return self.outputs.get(f"{owner}/{slug}", {}).get(file)


def _handler(kaggle: KaggleServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments) -> None:
            pass

        def _send(self, status: int, body: bytes, kind: str = "application/json") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _path(self) -> str | None:
            """Of a request to Kaggle; any other is noted and refused."""
            url = urllib.parse.urlsplit(self.path)
            if url.hostname != "localhost":
                kaggle.strays.append(self.path)
                self._send(502, b"{}")
                return None
            return urllib.parse.unquote(url.path)

        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_POST(self) -> None:
            body, path = self._body(), self._path()
            if path is None:
                return
            status, answer = kaggle.answer(path.rpartition("/")[2], json.loads(body or b"{}"))
            try:
                self._send(status, json.dumps(answer).encode())
            except OSError:
                self.close_connection = True  # a client that did not wait

        def do_PUT(self) -> None:
            body, path = self._body(), self._path()
            if path is not None:
                kaggle.upload(path.rpartition("/")[2], body)
                self._send(200, b"{}")

        def do_GET(self) -> None:
            path = self._path()
            if path is None:
                return
            content = kaggle.download(path.removeprefix("/output/"))
            if content is None:
                self._send(404, b"{}")
            else:
                self._send(200, content, "application/octet-stream")

        def do_CONNECT(self) -> None:
            kaggle.strays.append(self.path)
            self._send(502, b"")

    return Handler


@contextmanager
def kaggle_server() -> Iterator[KaggleServer]:
    server = KaggleServer()
    try:
        yield server
    finally:
        server.close()
