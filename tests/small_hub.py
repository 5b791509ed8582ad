"""A server on this machine that speaks as much of the Hub's protocol as an upload of a folder needs."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

MOST = 64 * 2**20
"""The most bytes of a request."""

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server has been told.

    Attributes:
        url: Where it is.
        repositories: The files of each repository, and whether it is private.
        large: The contents of large files by their SHA-256.
        refuses: What is answered to a commit instead of taking it; None to take it.
        commits: The number of commits.
    """

    url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refuses: str | None = None
    commits: int = 0

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        """The status and the data of the answer to a POST."""
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            head = json.loads(body)["content"].split("---")[1]
            valid = isinstance(yaml.safe_load(head), dict)
            return (200, {"errors": [], "warnings": []}) if valid else (400, {"errors": [{"message": "no metadata"}]})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [self.upload_of(one) for one in json.loads(body)["objects"]]
            return 200, {"transfer": "basic", "objects": objects}
        name = "/".join(path.split("/")[3:5])
        if not path.startswith("/api/models/") or name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = {True: "lfs", False: "regular"}
            return 200, {
                "files": [
                    {"path": f["path"], "uploadMode": modes[f["path"].endswith((".safetensors", ".bin"))]}
                    | {"shouldIgnore": False}
                    for f in files
                ]
            }
        if path.endswith("/commit/main"):
            return self.commit(name, body)
        return 404, {"error": path}

    def create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        facts = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **facts}
        self.repositories[name], self.private[name] = {}, asked.get("visibility") == "private"
        return 200, facts

    def upload_of(self, one: dict[str, Any]) -> dict[str, Any]:
        action = {"upload": {"href": f"{self.url}/large/{one['oid']}"}}
        return {"oid": one["oid"], "size": one["size"], **({} if one["oid"] in self.large else {"actions": action})}

    def commit(self, name: str, body: bytes) -> tuple[int, Any]:
        if self.refuses is not None:
            return 403, {"error": self.refuses}
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.repositories[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.repositories[name][value["path"]] = self.large[value["oid"]]
        self.commits += 1
        return 200, {"success": True, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self, status: int, data: Any) -> None:
            content = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            if "error" in data:
                self.send_header("X-Error-Message", data["error"])
            self.end_headers()
            self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(min(int(self.headers.get("Content-Length", 0)), MOST))
            found = b""
            while (size := int(self.rfile.readline(), 16)) and len(found) < MOST:
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        def do_POST(self) -> None:
            self.reply(*hub.answer(self.path.partition("?")[0], self.body()))

        def do_PUT(self) -> None:
            hub.large[self.path.rpartition("/")[2]] = self.body()
            self.reply(200, {})

        def log_message(self, *args: Any) -> None:
            """Nothing is logged."""

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free port of this machine, until the context is left."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
