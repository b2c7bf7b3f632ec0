"""A stand-in for the Hub on the loopback, of which the files of one repository are read: as wholes, or some bytes of them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import huggingface_hub

from kit.loopback import serving

COMMIT = "c" * 40


@dataclass
class Shelf:
    """What the stand-in holds, and what it was asked.

    Attributes:
        folder: Where the files of the repository lie.
        url: Where it listens.
        asked: The files that were asked for, as wholes, in order; tests may put marks between them.
        bytes_of: Those of which some bytes were asked for.
    """

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    bytes_of: list[str] = field(default_factory=list)


def endpoint(url: str) -> dict[str, str]:
    """Returns what huggingface_hub makes of HF_ENDPOINT when it is imported."""
    return {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"}


@contextmanager
def shelf(folder: Path, monkeypatch, cache: Path) -> Iterator[Shelf]:
    """Runs a stand-in, and has huggingface_hub, in this process, ask it and keep what it gets in a cache of the test's own."""
    held = Shelf(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def serve(self):
            _, _, place = self.path.partition("?")[0].partition("/resolve/")
            file = held.folder / (place.partition("/")[2] or ".")
            if not file.is_file():
                return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content, wanted = file.read_bytes(), self.headers.get("Range")
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if self.command == "GET":
                (held.asked if wanted is None else held.bytes_of).append(file.name)
            if wanted is None:
                return self.answer(200, content, headers)
            first, last = wanted.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last or len(content)) + 1]
            return self.answer(
                206, part, headers | {"Content-Range": f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"}
            )

        do_GET = do_HEAD = serve

        def answer(self, code, content, headers):
            self.send_response(code)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            """Says nothing."""

    with serving(Handler) as held.url:
        own = {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(cache)}
        for name, value in {**own, **endpoint(held.url)}.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        yield held
