"""Fetching named files: each fault of a network ends in one line and no partial file, over loopback."""

import gzip
import hashlib
import io
import threading
import zipfile
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from helpers import data_of, refusal

from corpus import fetch
from corpus.dataset import Wanted
from corpus.fetch import ShardSet, Source
from corpus.load_shards import holds_shards, load_shards
from corpus.load_text import find_files
from corpus.rebuild import FetchError
from corpus.shards import header
from runtime.errors import UserError

CONTENTS = bytes(range(256)) * 1001
SHARD = header(50, np.dtype(np.uint16)) + bytes(100)
SHA256 = hashlib.sha256(CONTENTS).hexdigest()


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inside", data)
    return buffer.getvalue()


class Server(ThreadingHTTPServer):
    """A loopback server that answers each path in its own bad way and counts the requests."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: Counter[str] = Counter()
        self.released = threading.Event()  # set at the end of the test: lets the stalled answers go
        self.together = threading.Barrier(2, timeout=5)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.requests[self.path] += 1
        match self.path:
            case "/good":
                self.answer(CONTENTS)
            case "/zip":
                self.answer(zipped(CONTENTS))
            case "/lies":
                self.answer(CONTENTS[::-1])
            case "/short":
                self.answer(CONTENTS[:1000], promised=len(CONTENTS))
            case "/short_once":
                self.answer(CONTENTS[: 1000 if self.server.requests[self.path] == 1 else None], promised=len(CONTENTS))
            case "/together":
                self.server.together.wait()
                self.answer(CONTENTS)
            case "/stalls":
                self.answer(CONTENTS[:1000], promised=len(CONTENTS), before_the_end=self.server.released.wait)
            case "/to_good":
                self.redirect("/good")
            case "/to_file":
                self.redirect("file:///etc/hostname")
            case "/to_ftp":
                self.redirect("ftp://127.0.0.1/good")
            case "/shard_000001.bin" | "/shard_000002.bin" | "/val.bin":
                self.answer(SHARD)
            case "/shard_000003.bin":
                self.answer(SHARD[:-2])
            case "/busy":
                self.send_error(503)
            case _:
                self.send_error(404)

    def answer(self, body: bytes, promised: int | None = None, before_the_end=lambda: None):
        self.send_response(200)
        self.send_header("Content-Length", str(promised or len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()
        before_the_end()

    def redirect(self, to: str):
        self.send_response(302)
        self.send_header("Location", to)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def no_package(scratch: Path) -> Path:
    raise FetchError("no such package")


def source(url: str, **changes) -> Source:
    return replace(Source("a_text", "a_text.txt", SHA256, url, no_package), **changes)


def obtain(source: Source, folder: Path, said: list[str] | None = None) -> Path:
    say = (said if said is not None else []).append
    return fetch.obtain(source, folder, "config.dataset", say, timeout=0.2, pause=0.01)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- downloads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "requests", "reason"),
    [
        ("/short", 1 + fetch.RETRIES, "1,000 of 256,256 bytes"),
        ("/stalls", 1 + fetch.RETRIES, "timed out"),
        ("/busy", 1 + fetch.RETRIES, "HTTP 503"),
        ("/missing", 1, "HTTP 404"),
        ("/to_file", 1, "file:///etc/hostname"),
        ("/to_ftp", 1, "unknown url type: ftp"),
    ],
)
def test_bad_downloads_leave_nothing_and_say_it_in_one_line(server, tmp_path, path, requests, reason):
    message = refusal(obtain, source(server.url(path)), tmp_path)  # without a time-out, silence would hold it for ever
    assert message.startswith("config.dataset: a_text could not be fetched (")
    for part in (reason, "no such package", server.url(path), str(tmp_path / "a_text.txt"), SHA256):
        assert part in message
    assert names(tmp_path) == set()
    assert server.requests[path] == requests


def test_a_server_that_is_not_there_is_asked_once(server, tmp_path):
    url = server.url("/good")
    server.shutdown()
    server.server_close()
    with pytest.raises(FetchError, match="refused"):
        fetch.download(url, tmp_path / "out", pause=1e6)


def test_wrong_contents_are_kept_aside_and_never_at_the_path(server, tmp_path):
    got = hashlib.sha256(CONTENTS[::-1]).hexdigest()
    message = refusal(obtain, source(server.url("/lies")), tmp_path)
    assert got in message and SHA256 in message
    assert names(tmp_path) == {f"a_text.txt.{got[:8]}.bad"}


@pytest.mark.parametrize(
    ("path", "member"), [("/good", None), ("/to_good", None), ("/short_once", None), ("/zip", "inside")]
)
def test_good_downloads(server, tmp_path, path, member):
    said = []
    folder = tmp_path / "made" / "on the way"
    assert obtain(source(server.url(path), zip_member=member), folder, said).read_bytes() == CONTENTS
    assert names(folder) == {"a_text.txt"}
    assert said == [f"a_text: downloading {server.url(path)}"]
    obtain(source(server.url(path), zip_member=member), folder)
    assert server.requests[path] == (2 if path == "/short_once" else 1)  # the second time it is there


@pytest.mark.parametrize(("path", "member"), [("/zip", "absent"), ("/good", "inside")])
def test_bad_archives_are_reasons_too(server, tmp_path, path, member):
    message = refusal(obtain, source(server.url(path), zip_member=member), tmp_path)
    assert ("absent" if path == "/zip" else "not a zip file") in message
    assert names(tmp_path) == set()


def test_two_at_once(server, tmp_path):
    found = []
    read = lambda: found.append(obtain(source(server.url("/together")), tmp_path).read_bytes())
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert found == [CONTENTS] * 2
    assert names(tmp_path) == {"a_text.txt"}


# --- the other ways ---------------------------------------------------------------------------------------------------


def test_a_packed_file_beside_it_is_used_without_a_download(server, tmp_path):
    (tmp_path / "a_text.txt.gz").write_bytes(gzip.compress(CONTENTS))
    assert obtain(source(server.url("/good")), tmp_path).read_bytes() == CONTENTS
    assert names(tmp_path) == {"a_text.txt", "a_text.txt.gz"} and not server.requests


@pytest.mark.parametrize("damage", [lambda packed: packed[:500], lambda packed: b"x" + packed])
def test_a_damaged_packed_file_is_passed_over(server, tmp_path, damage):
    (tmp_path / "a_text.txt.gz").write_bytes(damage(gzip.compress(CONTENTS)))
    assert obtain(source(server.url("/good")), tmp_path).read_bytes() == CONTENTS


def test_rebuilding_comes_after_the_download(server, tmp_path):
    def build(scratch: Path) -> Path:
        (scratch / "any name").write_bytes(CONTENTS)
        return scratch / "any name"

    assert obtain(source(server.url("/missing"), rebuild=build), tmp_path).read_bytes() == CONTENTS
    assert names(tmp_path) == {"a_text.txt"}


def test_a_changed_file_is_set_aside_and_fetched_anew(server, tmp_path):
    aside = set()
    for edit in (b"mine", b"mine too"):
        (tmp_path / "a_text.txt").write_bytes(edit)
        said = []
        assert obtain(source(server.url("/good")), tmp_path, said).read_bytes() == CONTENTS
        got = hashlib.sha256(edit).hexdigest()
        assert len(said) == 2 and got in said[0] and SHA256 in said[0]
        aside.add(f"a_text.txt.{got[:8]}.bad")
    assert names(tmp_path) == {"a_text.txt"} | aside  # the second did not overwrite the first


def test_a_changed_file_that_cannot_be_fetched_anew_names_both_hashes(server, tmp_path):
    (tmp_path / "a_text.txt").write_bytes(b"mine")
    message = refusal(obtain, source(server.url("/missing")), tmp_path)
    assert hashlib.sha256(b"mine").hexdigest() in message and SHA256 in message


@pytest.mark.parametrize("obstacle", ["folder is a file", "path is a folder"])
def test_obstacles_on_the_disk_are_one_line(server, tmp_path, obstacle):
    folder = tmp_path / "data"
    if obstacle == "folder is a file":
        folder.write_text("")
    else:
        (folder / "a_text.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^config.dataset: .*; make its folder readable and writable$"):
        obtain(source(server.url("/good")), folder)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def shard_set(server, monkeypatch):
    monkeypatch.setitem(fetch.SHARD_SETS, "fineweb", ShardSet(server.url(""), "val.bin", "shard_{:06}.bin", 4))
    return server


def test_shards_are_fetched_one_by_one_and_no_more_than_asked_for(shard_set, tmp_path):
    (tmp_path / "fineweb").mkdir()
    (tmp_path / "fineweb" / "shard_000001.bin").write_bytes(SHARD)
    said: list[str] = []
    settings = {"data_dir": tmp_path, "val_fraction": 0.1, "test_fraction": 0.0, "context_len": 9, "say": said.append}
    assert holds_shards("fineweb", "gpt2")
    for _ in range(2):  # the second time all are there
        data = load_shards(Wanted("fineweb", "byte", train_shards=2, **settings))
        assert data.train.num_tokens == 100 and data.val.num_tokens == 50
    assert [line.rpartition("/")[2] for line in said] == ["val.bin", "shard_000002.bin"]
    assert names(tmp_path / "fineweb") == {"val.bin", "shard_000001.bin", "shard_000002.bin"}
    assert shard_set.requests == {"/val.bin": 1, "/shard_000002.bin": 1}


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (3, r"config\.dataset: shard_000003.bin could not be fetched \(has 1,122 bytes where 50 tokens need 1,124; "),
        (4, r"config\.dataset: shard_000004.bin could not be fetched \(HTTP 404 Not Found\); put http.* at .* by hand"),
        (5, r"config\.train_shards: fineweb has 4 shards to train on, not 5; lower it"),
    ],
)
def test_a_shard_that_cannot_be_had_is_one_line(shard_set, tmp_path, count, words):
    for i in range(1, count):
        (tmp_path / "fineweb").mkdir(exist_ok=True)
        (tmp_path / "fineweb" / f"shard_{i:06}.bin").write_bytes(SHARD)
    with pytest.raises(UserError, match=rf"^{words}[^\n]*$"):
        fetch.shard_paths("fineweb", count, tmp_path, lambda line: None)
    assert {name for name in names(tmp_path / "fineweb") if name.startswith("shard")} == {
        f"shard_{i:06}.bin" for i in range(1, min(count, 5))
    }


def test_the_public_shards_by_name(tmp_path, monkeypatch):
    asked: list[str] = []

    def download(url, out, timeout):
        asked.append(url)
        out.write_bytes(SHARD)

    monkeypatch.setattr(fetch, "download", download)
    paths = fetch.shard_paths("fineweb", 2, tmp_path, lambda line: None)
    assert [path.name for path in paths] == [
        *("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin")
    ]
    folder = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
    assert asked == [folder + path.name for path in paths]


def test_a_data_set_that_is_there_is_taken(tmp_path, monkeypatch):
    url = "http://127.0.0.1:9/"  # the discard port: nobody answers
    monkeypatch.setitem(fetch.DATASETS, "tiny_shakespeare", source(url, filename="tiny_shakespeare.txt"))
    (tmp_path / "tiny_shakespeare.txt").write_bytes(CONTENTS)
    assert find_files("tiny_shakespeare", tmp_path, print) == [tmp_path / "tiny_shakespeare.txt"]


def test_a_data_set_is_one_text_beside_a_folder_of_its_name_too(tmp_path, monkeypatch):
    named = source("http://127.0.0.1:9/", filename="tiny_shakespeare.txt")
    monkeypatch.setitem(fetch.DATASETS, "tiny_shakespeare", named)
    (tmp_path / "tiny_shakespeare.txt").write_bytes(CONTENTS)
    (tmp_path / "tiny_shakespeare").mkdir()
    monkeypatch.chdir(tmp_path)
    data = data_of("tiny_shakespeare", "byte", data_dir=tmp_path, val_fraction=0.5, test_fraction=0.0, context_len=4)
    assert bytes(data.train.tokens.tolist()) == CONTENTS[: len(CONTENTS) // 2] and data.train.files == ()


def test_vocabularies_are_those_that_tiktoken_pins(monkeypatch):
    from tiktoken_ext import openai_public

    pinned = []

    def of_two_files(vocab_bpe_file, encoder_json_file, vocab_bpe_hash, encoder_json_hash):
        pinned.extend([(vocab_bpe_file, vocab_bpe_hash), (encoder_json_file, encoder_json_hash)])

    monkeypatch.setattr(
        openai_public, "load_tiktoken_bpe", lambda url, expected_hash: pinned.append((url, expected_hash))
    )
    monkeypatch.setattr(openai_public, "data_gym_to_mergeable_bpe_ranks", of_two_files)
    for encoding, sources in fetch.VOCABULARIES.items():
        pinned.clear()
        getattr(openai_public, encoding)()
        assert [(source.url, source.sha256) for source in sources] == pinned
        assert [source.filename for source in sources] == [hashlib.sha1(url.encode()).hexdigest() for url, _ in pinned]


@pytest.fixture
def no_cache_set(monkeypatch):
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)


def test_tiktoken_cache_fetches_what_is_missing(no_cache_set, server, tmp_path, monkeypatch):
    wanted = (source(server.url("/good"), filename="one"), source(server.url("/to_good"), filename="two"))
    monkeypatch.setitem(fetch.VOCABULARIES, "gpt2", wanted)
    folder = fetch.tiktoken_cache("gpt2", tmp_path, lambda line: None)
    assert folder == tmp_path / "tiktoken" and names(folder) == {"one", "two"}
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))  # by the caller: not to be taken for the user's
    (folder / "two").unlink()
    assert fetch.tiktoken_cache("gpt2", tmp_path, lambda line: None) == folder and names(folder) == {"one", "two"}
    assert server.requests == {"/good": 3, "/to_good": 2}  # "one", "two" by way of a redirect, "two" again
    assert fetch.tiktoken_cache("an encoding of tomorrow", tmp_path) == folder


@pytest.mark.parametrize("variable", ["TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_a_tiktoken_cache_that_the_user_set_is_left_alone(no_cache_set, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "theirs"))
    assert fetch.tiktoken_cache("gpt2", tmp_path / "data") == tmp_path / "theirs"
    assert names(tmp_path) == set()
