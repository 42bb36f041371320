"""A hub on the loopback that speaks as much of its protocol as a download needs, and repositories to serve."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(repositories: dict[str, Path], cut: str = "") -> Iterator[tuple[str, list[str]]]:
    """The address of a hub with repositories, OWNER/NAME -> directory, and the files that were asked of it.

    Args:
        cut: the first time, this file breaks off in the middle.
    """
    asked: list[str] = []
    broken: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self._answer(with_body=False)

        def do_GET(self):
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            path = self.path.partition("?")[0].strip("/").split("/")
            if path[:2] == ["api", "models"]:
                self._send_json("/".join(path[2:4]))
            elif len(path) >= 5 and path[2] == "resolve":
                self._send_file("/".join(path[:2]), "/".join(path[4:]), with_body)
            else:
                self._refuse("EntryNotFound")

        def _send_json(self, repository: str) -> None:
            folder = repositories.get(repository)
            if folder is None:
                self._refuse("RepoNotFound")
                return
            files = [
                {"rfilename": str(file.relative_to(folder)), "size": file.stat().st_size}
                for file in sorted(folder.rglob("*"))
                if file.is_file()
            ]
            body = json.dumps({"id": repository, "sha": COMMIT, "siblings": files}).encode()
            self._send(200, {"Content-Type": "application/json"}, body, True)

        def _send_file(self, repository: str, name: str, with_body: bool) -> None:
            folder = repositories.get(repository)
            if folder is None or not (folder / name).is_file():
                self._refuse("EntryNotFound" if folder else "RepoNotFound")
                return
            body = (folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
            if with_body:
                asked.append(name)
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206 if start else 200, headers, body[start:], with_body, name == cut and name not in broken)
            if name == cut and with_body:
                broken.append(name)

        def _send(self, code: int, headers: dict[str, str], body: bytes, with_body: bool, breaks: bool = False) -> None:
            self.send_response(code)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body[: len(body) // 2] if breaks else body)
            if with_body and breaks:
                self.close_connection = True

        def _refuse(self, code: str) -> None:
            self._send(404, {"X-Error-Code": code, "X-Error-Message": "not here"}, b"", True)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
