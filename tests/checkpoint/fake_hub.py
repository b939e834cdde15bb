"""A hub on 127.0.0.1: enough of its HTTP interface for `huggingface_hub` to download a repository."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves one repository, `org/tiny`; `org/gated` wants the token `good`, all others do not exist."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.requests: list[str] = []
        """`METHOD path`, with the range where one was asked for."""
        self.cut_once: dict[str, int] = {}
        """File to the number of bytes after which its first download breaks."""
        self.url = ""

    @contextlib.contextmanager
    def serve(self) -> Iterator["FakeHub"]:
        """Answer requests until the block ends."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(self))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def downloads(self) -> list[str]:
        """Files whose bytes were asked for."""
        return [line.split("/")[-1] for line in self.requests if line.startswith("GET") and "/resolve/" in line]


def _make_handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer()

        def do_GET(self) -> None:
            self._answer()

        def _answer(self) -> None:
            path = unquote(self.path.split("?")[0])
            hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
            parts = path.strip("/").split("/")
            is_api = parts[0] == "api"
            repository = "/".join(parts[2:4] if is_api else parts[:2])
            if not self._is_allowed(repository):
                return
            if is_api and parts[4:5] == ["revision"]:
                self._send_info(repository, "/".join(parts[5:]))
            elif is_api and parts[4:5] == ["tree"]:
                self._send_json([_describe(name, data) for name, data in hub.files.items()])
            elif parts[2:3] == ["resolve"]:
                self._send_file("/".join(parts[4:]))
            else:
                self._send_error(404, "EntryNotFound")

        def _is_allowed(self, repository: str) -> bool:
            if repository == "org/gated" and self.headers.get("Authorization") != "Bearer good":
                self._send_error(401, "GatedRepo")
            elif repository not in ("org/tiny", "org/gated"):
                self._send_error(404, "RepoNotFound")
            else:
                return True
            return False

        def _send_info(self, repository: str, revision: str) -> None:
            if revision not in ("main", "v1", COMMIT):
                self._send_error(404, "RevisionNotFound")
                return
            siblings = [{"rfilename": name} for name in hub.files]
            self._send_json({"id": repository, "sha": COMMIT, "siblings": siblings})

        def _send_json(self, value: object) -> None:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def _send_error(self, status: int, code: str) -> None:
            self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def _send_file(self, name: str) -> None:
            if name not in hub.files:
                self._send_error(404, "EntryNotFound")
                return
            data = hub.files[name]
            headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if start_text := self.headers.get("Range", "").removeprefix("bytes=").rstrip("-"):
                start = int(start_text)
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
                self._send(206, data[start:], headers)
            elif self.command == "GET" and name in hub.cut_once:
                self._send(200, data, headers, num_sent=hub.cut_once.pop(name))
            else:
                self._send(200, data, headers)

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], num_sent: int | None = None) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body[:num_sent])
            if num_sent is not None:
                self.close_connection = True

    return Handler


def _describe(name: str, data: bytes) -> dict[str, object]:
    blob_id = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": name, "size": len(data), "oid": blob_id}
