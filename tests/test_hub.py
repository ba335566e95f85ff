"""Names on the hub against a hub of our own on this machine, and without any."""

import hashlib
import json
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from bimamba_lit.errors import UserError
from bimamba_lit.hub import hub_file, hub_folder, hub_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "model.safetensors": b"tensors",
    "pytorch_model.bin": b"a pickle",
    "modeling_ours.py": b"code",
    "onnx/config.json": b"{}",
}


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that a download needs, for OWNER/NAME; other owners get a refusal."""

    asked: list[str] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition("?")[0]
        self.asked.append(path)
        refusals = {"gated": (403, "GatedRepo"), "absent": (401, "RepoNotFound"), "broken": (500, "")}
        for owner, (code, reason) in refusals.items():
            if f"/{owner}/" in path:
                return self.answer(b"{}", body, code, **({"X-Error-Code": reason} if reason else {}))
        if path.startswith("/api/models/owner/name/tree/"):
            listed = [{"type": "file", "path": p, "size": len(c), "oid": digest(c)} for p, c in FILES.items()]
            return self.answer(json.dumps(listed).encode(), body)
        if path.startswith("/api/models/owner/name"):
            return self.answer(json.dumps({"id": "owner/name", "sha": COMMIT}).encode(), body)
        if path.startswith("/api/"):
            return self.answer(b"{}", body)
        content = FILES[path.removeprefix(f"/owner/name/resolve/{COMMIT}/")]
        return self.answer(content, body, ETag=f'"{digest(content)}"', **{"X-Repo-Commit": COMMIT})

    def answer(self, content, body, code=200, **headers):
        self.send_response(code)
        headers = {"Content-Length": str(len(content)), "Content-Type": "application/json"} | headers
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def digest(content):
    return hashlib.sha1(content).hexdigest()


def point_to(endpoint, monkeypatch):
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no hub behind it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    point_to("http://127.0.0.1:9", monkeypatch)
    return tmp_path


@pytest.fixture
def hub(cache, monkeypatch):
    """A hub that counts what it is asked for."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        point_to(f"http://127.0.0.1:{server.server_port}", monkeypatch)
        Hub.asked.clear()
        yield Hub.asked
        server.shutdown()
        thread.join()


def told(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_name_is_told_by_its_prefix():
    assert hub_name("hub:owner/Name-1.5_x") == "owner/Name-1.5_x"
    for path in ("owner/name", "hub/name", "bytes"):
        assert hub_name(path) is None


@pytest.mark.parametrize("name", ["", "name", "a/b/c", "/b", "a b/c", "a/b@main"])
def test_a_name_needs_an_owner(name):
    assert told(hub_name, f"hub:{name}").endswith("which is written hub:OWNER/NAME")


def test_only_data_is_fetched_and_found_again_without_a_network(hub, monkeypatch):
    folder = hub_folder("owner/name")
    assert {p.name for p in folder.rglob("*")} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == b"tensors"
    point_to("http://127.0.0.1:9", monkeypatch)
    assert hub_folder("owner/name") == folder
    assert hub_file("owner/name", "tokenizer.json").read_bytes() == FILES["tokenizer.json"]


def test_weights_as_a_pickle_only_where_there_are_no_others(hub, monkeypatch):
    monkeypatch.delitem(FILES, "model.safetensors")
    folder = hub_folder("owner/name")
    assert {p.name for p in folder.rglob("*")} == {"config.json", "tokenizer.json", "pytorch_model.bin"}


def test_one_file(hub):
    assert hub_file("owner/name", "tokenizer.json").read_bytes() == FILES["tokenizer.json"]
    assert not any("safetensors" in path for path in hub)
    assert "hub:owner/name has no file vocab.json" in told(hub_file, "owner/name", "vocab.json")


@pytest.mark.parametrize("call", [hub_folder, lambda name: hub_file(name, "tokenizer.json")], ids=["folder", "file"])
def test_refusals(hub, call):
    message = told(call, "gated/name")
    assert "accept them at huggingface.co/gated/name and log in" in message
    assert "is not on the Hugging Face hub, or is private" in told(call, "absent/name")


def test_no_network_is_told_in_seconds(cache):
    start = time.monotonic()
    assert "the Hugging Face hub cannot be reached and the model is not in" in told(hub_folder, "owner/name")
    assert "and the file tokenizer.json is not in" in told(hub_file, "owner/name", "tokenizer.json")
    assert time.monotonic() - start < 10


def test_offline_on_purpose(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and the model is not in the local cache" in told(hub_folder, "owner/name")
    assert hub == []


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("strange\nin two lines")])
def test_any_other_failure(cache, monkeypatch, failure):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    message = told(hub_folder, "owner/name")
    assert message.startswith("cannot fetch hub:owner/name from the Hugging Face hub: ")
    assert "No space left" in message or message.endswith("strange")
