"""`--push-to-hub` against a server on localhost that speaks the Hub's protocol; the network is never asked."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from modelzip.checkpoints.errors import MachineError, OutputError, RecipeError
from modelzip.exporters.hub import Repository


class Hub:
    """What was asked of the server. refuse: paths that it answers with status 403."""

    def __init__(self) -> None:
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.commits: list[str] = []
        self.refuse: set[str] = set()


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, body: Any) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def do_GET(self) -> None:
            known = self.headers.get("Authorization") == "Bearer hf_good"
            if self.path == "/api/whoami-v2" and known:
                return self.answer(200, {"name": "ada", "type": "user"})
            if self.path == "/api/whoami-v2":
                return self.answer(401, {"error": "Invalid token"})
            if "create" in hub.refuse:
                return self.answer(404, {"error": "Repository not found"})
            return self.answer(200, {"id": "ada/small", "sha": "0" * 40, "siblings": [], "tags": []})

        def do_POST(self) -> None:
            data = self.body()
            if any(part in self.path for part in hub.refuse):
                return self.answer(403, {"error": "Forbidden"})
            if self.path == "/api/repos/create":
                hub.made.append(json.loads(data))
                return self.answer(200, {"url": f"http://{self.headers['Host']}/ada/small", "id": "ada/small"})
            if "/preupload/" in self.path:
                asked = json.loads(data)["files"]
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".gguf") else "regular",
                        "shouldIgnore": False,
                    }
                    for one in asked
                ]
                return self.answer(200, {"files": modes})
            if self.path.endswith("/info/lfs/objects/batch"):
                objects = json.loads(data)["objects"]
                host = self.headers["Host"]
                return self.answer(
                    200,
                    {
                        "transfer": "basic",
                        "objects": [
                            {**one, "actions": {"upload": {"href": f"http://{host}/put/{one['oid']}"}}}
                            for one in objects
                        ],
                    },
                )
            if "/commit/" in self.path:
                for line in data.decode().splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "header":
                        hub.commits.append(entry["value"]["summary"])
                    elif entry["key"] == "file":
                        hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                    elif entry["key"] == "lfsFile":
                        hub.files[entry["value"]["path"]] = hub.stored[entry["value"]["oid"]]
                commit = {"commitUrl": f"http://{self.headers['Host']}/ada/small/commit/1", "commitOid": "1" * 40}
                return self.answer(200, {**commit, "success": True, "hookOutput": ""})
            return self.answer(200, {})

        def do_PUT(self) -> None:
            hub.stored[self.path.rpartition("/")[2]] = self.body()
            self.answer(200, {})

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on localhost that knows the token `hf_good` of the user ada."""
    made = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(made))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "out" / "sub" / "notes.txt").write_text("small", encoding="utf-8")
    (tmp_path / "out" / "model.gguf").write_bytes(bytes(range(256)) * 100)
    return tmp_path / "out"


def test_all_files_of_the_folder_are_uploaded_in_one_commit(hub: Hub, folder: Path) -> None:
    address = Repository.checked("small", private=True).push(folder)
    assert address.endswith("/ada/small")
    assert len(hub.made) == 1, hub.made
    assert (hub.made[0]["name"], hub.made[0]["organization"]) == ("small", "ada")
    assert hub.made[0].get("private") or hub.made[0].get("visibility") == "private"  # as the library's release says it
    wanted = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert hub.files == wanted
    assert list(hub.stored) == [sha256(wanted["model.gguf"]).hexdigest()]
    assert hub.commits == ["Upload by modelzip"]


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-small", ""])
def test_a_wrong_name_is_refused_before_anything_is_asked(name: str) -> None:
    with pytest.raises(RecipeError, match="no repository's name: write it as owner/name"):
        Repository.checked(name, private=False)


def test_a_token_that_is_lacking_or_wrong_is_told_before_the_work(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(RecipeError, match=r"didn't take your token \(status 401\)"):
        Repository.checked("ada/small", private=False)
    monkeypatch.setattr("modelzip.exporters.hub.get_token", lambda: None)
    with pytest.raises(RecipeError, match="you aren't logged in: run `hf auth login`, or set HF_TOKEN"):
        Repository.checked("ada/small", private=False)


@pytest.mark.parametrize("step", ["create", "commit"])
def test_a_repository_that_takes_nothing_leaves_the_output_where_it_is(hub: Hub, folder: Path, step: str) -> None:
    repository = Repository.checked("ada/small", private=False)
    hub.refuse.add(step)
    with pytest.raises(OutputError, match=r"was written, but ada/small didn't take it \(status 403\)"):
        repository.push(folder)
    assert (folder / "model.gguf").is_file()


def test_a_hub_that_is_not_there_is_the_machines_fault(monkeypatch: pytest.MonkeyPatch, hub: Hub) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="the Hub can't be reached"):
        Repository.checked("ada/small", private=False)
