"""A stand-in for the Hub on the loopback: as much of its API as creating a repository and uploading a folder take."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler

import huggingface_hub

from kit.loopback import serving

TOKEN = "hf_of_the_tests"


@dataclass
class Hub:
    """What the stand-in holds, and how it answers.

    Attributes:
        url: Where it listens.
        repos: The repositories by name, each with its branches, which hold files by path.
        private: Whether a repository is private, by name.
        refuse: A part of the paths that are refused, with 403.
        asked: The paths that were asked for.
    """

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    refuse: str = "\0"
    asked: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def create(self, asked: dict) -> tuple[int, dict]:
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.repos:
            return 409, {"error": "it is there already", "url": f"{self.url}/{name}"}
        self.repos[name], self.private[name] = {"main": {}}, asked.get("visibility") == "private" or asked.get("private", False)
        return 200, {"url": f"{self.url}/{name}"}

    def preupload(self, asked: dict) -> tuple[int, dict]:
        modes = [("lfs" if one["path"].endswith(".safetensors") else "regular", one["path"]) for one in asked["files"]]
        return 200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]}

    def batch(self, asked: dict) -> tuple[int, dict]:
        to = [{"upload": {"href": f"{self.url}/large/{one['oid']}", "header": {}}} for one in asked["objects"]]
        objects = [{**one, "actions": action} for one, action in zip(asked["objects"], to, strict=True)]
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, name: str, branch: str, lines: list[dict]) -> tuple[int, dict]:
        if branch not in self.repos[name]:
            return 404, {"error": f"there is no branch {branch}"}
        files = self.repos[name][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.large[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        parts = path.strip("/").split("/")
        match method, parts:
            case "POST", ["api", "repos", "create"]:
                return self.create(json.loads(body))
            case "POST", ["api", "validate-yaml"]:
                return 200, {"errors": [], "warnings": []}
            case "GET", ["api", "models", user, own, *_] if (name := f"{user}/{own}") in self.repos:
                return 200, {"id": name, "modelId": name, "sha": "0" * 40, "private": self.private[name], "siblings": []}
            case "POST", ["api", "models", user, own, "branch", branch]:
                return (200, {}) if self.repos[f"{user}/{own}"].setdefault(branch, {}) == {} else (409, {"error": "there"})
            case "POST", ["api", "models", _, _, "preupload", _]:
                return self.preupload(json.loads(body))
            case "POST", [_, _, "info", "lfs", "objects", "batch"]:
                return self.batch(json.loads(body))
            case "PUT", ["large", oid]:
                assert hashlib.sha256(body).hexdigest() == oid
                self.large[oid] = body
                return 200, {}
            case "POST", ["api", "models", user, own, "commit", branch]:
                return self.commit(f"{user}/{own}", branch, [json.loads(line) for line in body.splitlines()])
        return 404, {"error": f"the stand-in does not know {method} {path}"}


@contextmanager
def hub() -> Iterator[Hub]:
    """Runs a stand-in."""
    held = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self):
            path, body = self.path.partition("?")[0], self.body()
            held.asked.append(f"{self.command} {path}")
            allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}" or path.startswith("/large/")
            code, found = (401, {"error": "no such token"}) if not allowed else (403, {"error": "the stand-in refuses this"})
            if allowed and held.refuse not in path:
                code, found = held.answer(self.command, path, body)
            text = json.dumps(found).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            if code >= 400:
                self.send_header("X-Error-Message", found["error"])
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = serve

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_):
            """Says nothing."""

    with serving(Handler) as held.url:
        yield held


def to_hub(monkeypatch, held: Hub) -> None:
    """Has huggingface_hub, in this process, ask a stand-in, with its token, and without Xet."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", held.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
