"""Data sets: what is known of them, downloads over a real connection, and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import io
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import scene
from neuralcodec.cli import main
from neuralcodec.container.errors import UsageError
from neuralcodec.datasets import fetch, registry
from neuralcodec.datasets.fetch import ChecksumError, download
from neuralcodec.datasets.registry import Dataset, DatasetError, Source
from PIL import Image

CONTENT = np.random.default_rng(0).integers(0, 256, 700_000, np.uint8).tobytes()
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Files over HTTP on loopback. ``cut`` ends so many answers after ``cut_at`` bytes; ``requests`` keeps the ranges."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/data.bin": CONTENT}
        self.cut, self.cut_at, self.tag, self.ranges = 0, 300_000, '"v1"', True
        self.requests: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                wanted = self.headers.get("Range")
                outer.requests.append(wanted)
                body = outer.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                start = 0
                if wanted and outer.ranges and self.headers.get("If-Range", outer.tag) == outer.tag:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                if start >= len(body) > 0:
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(body)}")
                    self.end_headers()
                    return
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.send_header("Content-Length", str(len(body) - start))
                if outer.tag:
                    self.send_header("ETag", outer.tag)
                self.end_headers()
                end = len(body)
                if outer.cut:
                    outer.cut -= 1
                    end = min(end, start + outer.cut_at)
                self.wfile.write(body[start:end])

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server():
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch, tmp_path):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NEURALCODEC_DATA", str(tmp_path / "data"))


def made(server: Server, **fields) -> Dataset:
    plain = {
        "name": "small", "title": "a set", "kind": "bytes", "home": "https://example.org", "licence": "free",
        "files": (Source(f"{server.url}/data.bin", "data.bin", checksum=SHA),), "splits": {"test": ["*"]},
        "count": {"test": 1}, "note": "", "checked": "bytes", "content": {"data.bin": SHA.partition(":")[2]},
    }  # fmt: skip
    return Dataset(**plain | fields)


def test_a_download_goes_on_where_it_was_cut(server, tmp_path):
    server.cut, seen = 2, []
    download(f"{server.url}/data.bin", tmp_path / "x", SHA, wait=0, progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert server.requests == [None, "bytes=300000-", "bytes=600000-"]
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["x"]


def test_a_later_call_resumes(server, tmp_path):
    server.cut = 9
    with pytest.raises(DatasetError, match="no whole answer .300,000 of 700,000 bytes"):
        download(f"{server.url}/data.bin", tmp_path / "x", SHA, attempts=1)
    assert (tmp_path / "x.partial").stat().st_size == 300_000 and not (tmp_path / "x").exists()
    server.cut = 0
    download(f"{server.url}/data.bin", tmp_path / "x", SHA)
    assert server.requests[-1] == "bytes=300000-" and (tmp_path / "x").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_anew(server, tmp_path):
    server.cut = 9
    with pytest.raises(DatasetError):
        download(f"{server.url}/data.bin", tmp_path / "x", attempts=1)
    server.cut, server.tag = 0, '"v2"'
    server.files["/data.bin"] = CONTENT[::-1]
    download(f"{server.url}/data.bin", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == CONTENT[::-1]


def test_a_server_without_ranges(server, tmp_path):
    server.cut, server.ranges = 1, False
    download(f"{server.url}/data.bin", tmp_path / "x", SHA, wait=0)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_partial_file_that_is_whole_already(server, tmp_path):
    (tmp_path / "x.partial").write_bytes(CONTENT)
    download(f"{server.url}/data.bin", tmp_path / "x", SHA)
    assert (tmp_path / "x").read_bytes() == CONTENT


def test_a_wrong_checksum_is_not_kept(server, tmp_path):
    with pytest.raises(ChecksumError, match="wrong sha256: .* arrived where 0000 was expected"):
        download(f"{server.url}/data.bin", tmp_path / "x", "sha256:0000")
    assert not list(p for p in tmp_path.iterdir() if p.is_file())


def test_what_the_server_refuses(server, tmp_path):
    with pytest.raises(DatasetError, match="answers 404"):
        download(f"{server.url}/none", tmp_path / "x")
    assert len(server.requests) == 1  # asking again would not help
    with pytest.raises(DatasetError, match="only http and https"):
        download("file:///etc/hostname", tmp_path / "x")


def test_fetch_then_skip(server):
    dataset = made(server)
    folder = fetch.fetch(dataset)
    assert (folder / "data.bin").read_bytes() == CONTENT and len(server.requests) == 1
    fetch.fetch(dataset)
    assert len(server.requests) == 1
    (folder / "data.bin").write_bytes(b"damaged")
    with pytest.raises(DatasetError, match="wrong sha256; remove it and get it again"):
        fetch.fetch(dataset)


@pytest.mark.parametrize("form", ["zip", "tar"])
def test_archives_are_unpacked(server, form):
    buffer = io.BytesIO()
    if form == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("in/data.bin", CONTENT)
            archive.writestr("__MACOSX/in/._data.bin", b"junk")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            member = tarfile.TarInfo("in/data.bin")
            member.size = len(CONTENT)
            archive.addfile(member, io.BytesIO(CONTENT))
    server.files["/a"] = buffer.getvalue()
    dataset = made(server, files=(Source(f"{server.url}/a", "a", unpack=True),), content={"in/data.bin": SHA[7:]})
    folder = fetch.fetch(dataset)
    assert (folder / "in/data.bin").read_bytes() == CONTENT and not (folder / "__MACOSX").exists()
    assert not (folder / "a").exists()
    fetch.fetch(dataset)
    assert len(server.requests) == 1


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "c:/out", "a\\..\\out"])
def test_archives_cannot_write_elsewhere(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(DatasetError, match="leads out of the folder"):
        fetch.unpack(tmp_path / "a.zip", tmp_path / "in")
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_place_is_named(monkeypatch, capsys, tmp_path):
    def offline(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setattr(fetch.time, "sleep", lambda _: None)
    for name in ("kodak", "canterbury", "uvg"):
        assert main(["fetch", name, "--quiet"]) == 1
        error = capsys.readouterr().err
        folder = tmp_path / "data" / registry.get(name).name
        assert f"put its files into {folder}" in error and "NEURALCODEC_DATA" in error and error.count("\n") == 1, error


@pytest.mark.parametrize("name", ["mcl-jcv", "era5-samples"])
def test_sets_without_a_download_say_how_to_get_them(name, capsys, tmp_path):
    assert main(["fetch", name]) == 1
    error = capsys.readouterr().err
    assert "cannot be downloaded" in error and f"put its files into {tmp_path / 'data' / name}" in error


def test_the_known_sets_are_complete(capsys):
    assert registry.names() == [
        "kodak", "clic2020-professional", "tecnick", "uvg", "mcl-jcv", "canterbury", "silesia", "enwik8", "era5-samples",
    ]  # fmt: skip
    for name in registry.names():
        dataset = registry.get(name)
        assert dataset.title and dataset.licence and dataset.home.startswith("https://")
        assert dataset.kind in ("image", "video", "grid", "bytes") and dataset.splits.keys() == dataset.count.keys()
        assert all(len(sha) == 64 for sha in dataset.content.values())
        assert all(s.url.startswith("https://") for s in dataset.files)
        assert not dataset.content or dataset.checked in ("pixels", "bytes")
    assert main(["fetch"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in registry.names())


def test_names_that_do_not_exist():
    with pytest.raises(UsageError, match="there is no data set 'imagenet'; known are kodak"):
        registry.get("imagenet")
    (registry.root() / "kodak").mkdir(parents=True)
    with pytest.raises(UsageError, match="has no split 'train'"):
        registry.find("kodak:train")
    with pytest.raises(DatasetError, match="0 files where the split 'test' has 24"):
        registry.find("kodak")
    for i in range(24):
        Image.fromarray(np.zeros((1, 1, 3), np.uint8)).save(registry.root() / "kodak" / f"{i}.png")
    with pytest.raises(UsageError, match="kodak holds image, not grid"):
        registry.find("kodak", "grid")
    assert registry.find("kodak", "bytes").kind == "bytes"


def test_a_set_is_known_by_its_pixels(monkeypatch):
    hashes = [registry.pixel_hash(scene(20, 20, i)) for i in range(3)]
    known = replace(registry.get("kodak"), name="three", content={str(i): h for i, h in enumerate(hashes)})
    monkeypatch.setattr(registry, "_sets", lambda: {"three": known})
    assert registry.identify(hashes[::-1]).name == "three" and registry.identify(hashes[:2]) is None
    with pytest.raises(DatasetError, match="2 is missing"):
        registry.check_pixels(known, {"0.png": hashes[0], "1.webp": hashes[1]})
    with pytest.raises(DatasetError, match="does not belong"):
        registry.check_pixels(known, {"9.png": hashes[0]})


def test_bytes_of_a_set_are_checked(tmp_path):
    dataset = registry.get("canterbury")
    dataset.folder.mkdir(parents=True)
    with pytest.raises(DatasetError, match="alice29.txt is missing"):
        registry.check_bytes(dataset)
    (dataset.folder / "alice29.txt").write_bytes(b"Alice")
    with pytest.raises(DatasetError, match="alice29.txt has a wrong sha256"):
        registry.check_bytes(dataset)


@pytest.mark.parametrize(("names", "kind"), [
    (["a.png", "b.nc"], "image"), (["b.nc", "c.y4m"], "grid"), (["c.y4m", "notes.txt"], "video"), (["seq/1.png"], "video"),
])  # fmt: skip
def test_the_kind_of_a_folder(names, kind, tmp_path):
    for name in names:
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "f" / name).touch()
    assert registry.find(tmp_path / "f").kind == kind
    if files := [n for n in names if "/" not in n]:
        every = registry.find(tmp_path / "f", "bytes")
        assert every.kind == "bytes" and [p.name for p in every.paths] == sorted(files)
