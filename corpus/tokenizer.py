"""Text to token ids and back, by characters, by bytes, by any tiktoken encoding, or with an imported model's tokenizer.

A tokenizer is built from a name (`build_tokenizer`) or from its saved form (`to_dict`, `tokenizer_from_dict`). A run
keeps the saved form, so that it can be read back without its text and without a download.
"""

import base64
import codecs
import hashlib
import json
import os
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import tiktoken
import tokenizers

from runtime.errors import UserError, one_line
from runtime.files import read_json
from runtime.screen.text import nearest

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")  # of a conversation; a turn is <|role|>, a text, END_OF_TURN
END_OF_TURN = "<|end|>"
OWN = "own"  # the name of each that `main.py tokenizer` made
# Far above any vocabulary in use. Without a limit, one absurd id in a damaged file would make lists of that length.
MAX_VOCAB_SIZE = 2**21

# The character that stands for each byte in a byte-level vocabulary (GPT-2's): the byte's own if it is visible, else
# the next unused one from U+0100 on.
_VISIBLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_HIDDEN = sorted(set(range(256)) - _VISIBLE)
BYTE_SYMBOLS = "".join(chr(byte if byte in _VISIBLE else 256 + _HIDDEN.index(byte)) for byte in range(256))
_BYTE_OF = {symbol: byte for byte, symbol in enumerate(BYTE_SYMBOLS)}

TokenIds = Sequence[int] | np.ndarray


class UnknownCharacters(ValueError):
    """The text has `characters` that the vocabulary lacks, each here once, in order of their first `positions`."""

    def __init__(self, characters: str, positions: tuple[int, ...]):
        self.characters, self.positions = characters, positions
        seen = [ascii(c) if unicodedata.combining(c) else repr(c) for c in characters[:8]]
        shown = [f"{c} at {p}" for c, p in zip(seen, positions, strict=False)]
        more = f" and {len(characters) - len(shown)} more" if len(characters) > len(shown) else ""
        super().__init__(f"characters not in the vocabulary: {', '.join(shown)}{more}")


class Tokenizer(ABC):
    """What every tokenizer offers.

    Attributes:
        name: "char", "byte", "imported" or the tiktoken encoding's name.
        vocab_size: V; ids lie in [0, V).
        eot: the id that ends a text, if there is one.
        unsampled: ids that stand for no text (gaps, control tokens other than `ends`) and must never be sampled.
        special: the ids of control tokens, by name.
    """

    name: str
    vocab_size: int
    eot: int | None = None
    unsampled: tuple[int, ...] = ()
    special: Mapping[str, int] = MappingProxyType({})

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids at which generation stops: `eot`, the end of a turn, and other end tokens of an imported model."""
        return () if self.eot is None else (self.eot,)

    @property
    def answer(self) -> tuple[int, int] | None:
        """The tokens with which the assistant's turns begin and end, if it has all that conversations need."""
        names = [*(f"<|{role}|>" for role in ROLES), END_OF_TURN]
        if self.eot is None or not self.special.keys() >= {*names}:
            return None
        return self.special[names[-2]], self.special[names[-1]]

    @property
    def dtype(self) -> np.dtype:
        """The type that `encode` returns and that encoded corpora are stored in."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    @abstractmethod
    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        """Token ids, 1-D, of type `dtype`. Raises UnknownCharacters (`char` only) unless `replace_unknown`."""

    @abstractmethod
    def decode_bytes(self, ids: TokenIds) -> bytes:
        """The UTF-8 of the ids, the first and last character perhaps incomplete; ValueError if an id has no bytes."""

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The whole tokenizer as values that JSON can hold, for `tokenizer_from_dict`."""

    def decode(self, ids: TokenIds) -> str:
        """The text of the ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def text_stream(self) -> "TextStream":
        """A decoder for ids that come one by one."""
        return TextStream(self)

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each id; b"" for one that stands for no text."""
        pieces = [b""] * self.vocab_size
        for i in set(range(self.vocab_size)) - {*self.unsampled, *self.ends, *self.special.values()}:
            pieces[i] = self.decode_bytes([i])
        return pieces

    @property
    def opening(self) -> str:
        """The default prompt: a line break, or "" if the vocabulary has none."""
        try:
            return "\n" if self.encode("\n").size else ""
        except UnknownCharacters:
            return ""

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the whole tokenizer: it differs if any token differs."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def _checked(self, ids: TokenIds) -> np.ndarray:
        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids {ids.min()} to {ids.max()} leave the vocabulary of {self.vocab_size}")
        return ids


class CharTokenizer(Tokenizer):
    """One id for each character, in the order of `symbols`, which may be any code points, also NUL and lone surrogates.

    Where asked for, `replacement` takes the place of unknown characters: a space, a newline, or else the first symbol.
    """

    name = "char"

    def __init__(self, symbols: Sequence[str]):
        if not symbols or any(not isinstance(s, str) or len(s) != 1 for s in symbols):
            raise ValueError("a character vocabulary needs one or more symbols of one character each")
        if len(set(symbols)) != len(symbols):
            raise ValueError("a character vocabulary names a symbol twice")
        self.symbols = tuple(symbols)
        self.vocab_size = len(symbols)
        self._code_points = np.array([ord(s) for s in symbols], dtype="<u4")
        # One entry for each code point, and a last one for all beyond: `take` clips to it.
        self._ids = np.full(int(self._code_points.max()) + 2, -1, dtype=np.int32)
        self._ids[self._code_points] = np.arange(self.vocab_size)
        self.replacement = next((symbol for symbol in (" ", "\n") if symbol in self.symbols), self.symbols[0])

    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.take(self._ids, code_points, mode="clip")
        unknown = np.flatnonzero(ids < 0)
        if unknown.size and not replace_unknown:
            _, first = np.unique(code_points[unknown], return_index=True)
            positions = tuple(sorted(unknown[first].tolist()))
            raise UnknownCharacters("".join(text[p] for p in positions), positions)
        ids[unknown] = self._ids[ord(self.replacement)]
        return ids.astype(self.dtype)

    def decode(self, ids: TokenIds) -> str:
        return self._code_points[self._checked(ids)].tobytes().decode("utf-32-le", "surrogatepass")

    def decode_bytes(self, ids: TokenIds) -> bytes:
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def to_dict(self) -> dict[str, Any]:
        # A list, not a string: JSON would read two lone surrogates side by side as one character.
        return {"kind": "char", "symbols": list(self.symbols)}


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        return self.encode_bytes(text.encode("utf-8", errors="replace"))

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Token ids of any bytes, text or not."""
        return np.frombuffer(data, dtype=np.uint8).astype(self.dtype)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        return self._checked(ids).astype(np.uint8).tobytes()

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "byte"}


MOST_BLANKS = 100_000  # in a row; a longer run is cut


def _ends_within_blanks(text: str) -> list[int]:
    """Where long runs of blanks are cut, so that a pattern can match each part."""
    runs = [match.span() for match in re.finditer(r"\s+", text) if match.end() - match.start() > MOST_BLANKS]
    return [place for start, stop in runs for place in range(start + MOST_BLANKS, stop, MOST_BLANKS)]


class TiktokenTokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken. Special tokens written in a text are plain text; lone surrogates become "?"."""

    def __init__(self, encoding: tiktoken.Encoding):
        self._encoding = encoding
        self.name = encoding.name
        self.vocab_size = encoding.n_vocab
        self.special = encoding._special_tokens
        self.eot = self.special.get(END_OF_TEXT)
        text = {*encoding._mergeable_ranks.values()}
        self.unsampled = tuple(sorted({*range(self.vocab_size)} - text - {*self.ends}))

    @property
    def ends(self) -> tuple[int, ...]:
        return (*super().ends, *((self.answer or ())[1:]))

    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        try:
            return self._ids(text)
        except UnicodeEncodeError:
            return self.encode(text.encode("utf-8", errors="replace").decode("utf-8"))
        except ValueError:  # the library's patterns backtrack too far in a run of a million blanks (tiktoken 0.14)
            places = [0, *_ends_within_blanks(text), len(text)]
            if len(places) == 2:
                raise
            return np.concatenate([self._ids(text[start:stop]) for start, stop in pairwise(places)])

    def _ids(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(self.dtype)

    def decode_bytes(self, ids: TokenIds) -> bytes:
        try:
            return self._encoding.decode_bytes(self._checked(ids).tolist())
        except KeyError as error:
            raise ValueError(f"a token id stands for no text: {error.args[0]}") from None

    def to_dict(self) -> dict[str, Any]:
        ranks = self._encoding._mergeable_ranks
        return {
            "kind": "tiktoken",
            "name": self.name,
            "pattern": self._encoding._pat_str,
            "ranks": {base64.b64encode(piece).decode("ascii"): rank for piece, rank in ranks.items()},
            "special": dict(self._encoding._special_tokens),
        }


class ImportedTokenizer(Tokenizer):
    """An imported model's tokenizer.json, run by the library tokenizers, without BPE dropout.

    No special tokens are added, and those written in a text are text (but for a Unigram model, which cannot tell them
    apart); lone surrogates become "?", an unknown character the unknown token or nothing. Where a space is put before a
    text, as by Llama 2's, `decode` removes it, but not `decode_bytes`. Raises ValueError if the library cannot read the
    content, a token is not text on its own (as WordPiece's), or it does not fit `vocab_size` and `eot`.

    `content` is the parsed tokenizer.json, `vocab_size` the model's V, which may exceed the tokenizer's, `eot` the id
    that ends a text, if there is one, and `more_ends` are others that do.
    """

    name = "imported"

    def __init__(self, content: dict[str, Any], vocab_size: int, eot: int | None, more_ends: Sequence[int] = ()):
        self._content, self.vocab_size, self.eot, self._more_ends = content, vocab_size, eot, tuple(more_ends)
        try:
            self._library = tokenizers.Tokenizer.from_str(json.dumps(without_dropout(content)))
            self._library.encode("\U0010ffff")  # in no vocabulary, so this fails if the unknown token is missing
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of the library is not an Exception
            raise ValueError(f"the library tokenizers cannot read it: {one_line(error)}") from None
        self._library.encode_special_tokens = True
        vocabulary, added = self._library.get_vocab(), self._library.get_added_tokens_decoder()
        if not 0 <= max(vocabulary.values(), default=-1) < vocab_size <= MAX_VOCAB_SIZE:
            raise ValueError(f"the tokenizer's {len(vocabulary)} tokens do not fit a vocabulary of {vocab_size}")
        if len(set(vocabulary.values())) < len(vocabulary):  # which of them an id is would change from start to start
            raise ValueError("two of the tokenizer's tokens have the same id")
        for token in content.get("added_tokens", []):
            if vocabulary.get(token["content"]) != token["id"]:
                raise ValueError(f"the token {token['content']!r} cannot have the id {token['id']}")
        if eot is not None and eot not in vocabulary.values():
            raise ValueError(f"the id {eot}, which should end a text, is none of the tokenizer's")
        if not all(type(end) is int and 0 <= end < vocab_size for end in self._more_ends):
            raise ValueError(f"the ids {self._more_ends}, which should end a text, leave the tokenizer's vocabulary")
        decoder: dict[str, Any] = {"type": "none"}
        if self._library.decoder:  # as the library writes it now; older files use other forms
            decoder = json.loads(self._library.decoder.__getstate__())
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        self.special = {token.content: i for i, token in added.items() if token.special}
        self._pieces = {i: _bytes_of(token, steps, i in added) for token, i in vocabulary.items()}
        strips = lambda step: step["type"] == "Strip" or step.get("prepend_scheme", "never") != "never"
        self._strips_space = any(map(strips, steps))
        text = self._pieces.keys() - {*self.special.values()}
        self.unsampled = tuple(sorted(set(range(vocab_size)) - text - {*self.ends}))

    @property
    def ends(self) -> tuple[int, ...]:
        return (*super().ends, *self._more_ends)

    def encode(self, text: str, replace_unknown: bool = False) -> np.ndarray:
        well_formed = text.encode("utf-8", errors="replace").decode("utf-8")
        [encoded] = self._library.encode_batch([well_formed], add_special_tokens=False)  # `encode` keeps Python's lock
        return np.array(encoded.ids, dtype=self.dtype)

    def decode(self, ids: TokenIds) -> str:
        text = super().decode(ids)
        return text.removeprefix(" ") if self._strips_space else text

    def decode_bytes(self, ids: TokenIds) -> bytes:
        try:
            return b"".join(self._pieces[i] for i in self._checked(ids).tolist())
        except KeyError as error:
            raise ValueError(f"a token id stands for no text: {error.args[0]}") from None

    def to_dict(self) -> dict[str, Any]:
        saved = {"kind": "imported", "json": self._content, "vocab_size": self.vocab_size, "eot": self.eot}
        return saved | ({"more_ends": list(self._more_ends)} if self._more_ends else {})


def without_dropout(content: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json without BPE dropout, so that a text gets the same ids every time."""
    model = content.get("model")
    drops = isinstance(model, dict) and model.get("dropout")
    return content | {"model": model | {"dropout": None}} if drops else content


def _bytes_of(token: str, steps: list[dict[str, Any]], added: bool) -> bytes:
    """The bytes that a token stands for under a decoder of these steps; ValueError if that depends on the others."""
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                plain = added or not _BYTE_OF.keys() >= set(token)  # such a token is written as plain text
                return token.encode() if plain else bytes(_BYTE_OF[symbol] for symbol in token)
            case {"type": "ByteFallback"}:
                if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
                    return bytes.fromhex(token[3:5])
            case {"type": "Replace", "pattern": {"String": str(mark)}, "content": str(text)}:
                token = token.replace(mark, text)
            case {"type": "Metaspace", "replacement": str(mark)}:
                token = token.replace(mark, " ")
            case {"type": "Fuse"} | {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
                pass  # they act on the whole text, not on a token
            case _:
                raise ValueError(f"a tokenizer whose decoder has a step of type {step['type']} is not supported")
    return token.encode()


class TextStream:
    """Decodes ids as they come, and holds a character back until all of its bytes are there."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: TokenIds) -> str:
        """The characters that these ids complete; the bytes of an incomplete one are kept for the next call."""
        return self._decoder.decode(self._tokenizer.decode_bytes(ids))

    def flush(self) -> str:
        """What is left at the end: "", or U+FFFD for an incomplete character."""
        return self._decoder.decode(b"", final=True)


class UpTo:
    """The text of pieces up to the stop that is the first to be there whole, without it; `ended` says if one was.

    What may be the beginning of a stop is held back until that is known.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held, self.ended = stops, "", False

    def feed(self, piece: str) -> str:
        """What is known to belong to the text, now that this piece came."""
        held = "" if self.ended else self._held + piece
        ends = [(at + len(stop), at) for stop in self._stops if (at := held.find(stop)) >= 0]
        self.ended = self.ended or bool(ends)
        begins = (at for at in range(len(held)) if any(stop.startswith(held[at:]) for stop in self._stops))
        known = min(ends)[1] if ends else next(begins, len(held))
        self._held = "" if self.ended else held[known:]
        return held[:known]

    def flush(self) -> str:
        """What was held back, as nothing comes after it."""
        return self._held


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """`UpTo` of the pieces; no more of them are asked for than are needed."""
    text = UpTo(stops)
    for piece in pieces:
        if known := text.feed(piece):
            yield known
        if text.ended:
            return
    if rest := text.flush():
        yield rest


def tokenizer_names() -> list[str]:
    """What config.tokenizer may be beside a directory."""
    return ["char", "byte", "imported", *tiktoken.list_encoding_names()]


def check_tokenizer_name(name: str) -> None:
    """Raises UserError unless `build_tokenizer` knows `name`; reads and downloads nothing."""
    names = tokenizer_names()
    if name not in names and os.sep not in name and not Path(name).is_dir():
        near, known = nearest(name, names) or ";", f"char, byte or one of {', '.join(names[3:])}"
        raise UserError(f"config.tokenizer: unknown tokenizer {name!r}{near} use {known}, or the directory of your own")


def is_called(tokenizer: Tokenizer, name: str) -> bool:
    """Whether config.tokenizer means this one: by its name, or by the directory that it came from, if that is there."""
    if name == tokenizer.name or name in tokenizer_names():
        return name == tokenizer.name
    gone = not (Path(name).expanduser() / "tokenizer.json").exists()
    return isinstance(tokenizer, TiktokenTokenizer) and (gone or _read(name).fingerprint == tokenizer.fingerprint)


def _read(folder: str) -> Tokenizer:
    path = Path(folder).expanduser() / "tokenizer.json"
    try:
        if isinstance(tokenizer := tokenizer_from_dict(read_json(path)), TiktokenTokenizer):
            return tokenizer
        raise ValueError(f"is of kind {tokenizer.name}")
    except ValueError as error:
        raise UserError(f"config.tokenizer: {path}: {one_line(error)}; make one by `main.py tokenizer`") from error


def build_tokenizer(name: str, text: str) -> Tokenizer:
    """A tokenizer by name: "char", whose vocabulary is the text's characters in sorted order, "byte" or tiktoken's; or
    the one of a directory that `main.py tokenizer` made, or that holds another of its kind.

    Tiktoken takes its vocabulary from its own cache, or downloads it where that has none. Raises UserError if no
    tokenizer has that name or lies there, or it is "imported", which only comes with a run's weights.
    """
    check_tokenizer_name(name)
    if name == "imported":
        raise UserError('config.tokenizer: "imported" comes with a run\'s weights; set config.init_from to it')
    if name == "char":
        return CharTokenizer(sorted(set(text)))
    if name == "byte":
        return ByteTokenizer()
    return TiktokenTokenizer(tiktoken.get_encoding(name)) if name in tokenizer_names() else _read(name)


def tokenizer_from_dict(saved: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` described; ValueError if it is none. Nothing in the content is executed."""
    match saved:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "char", "symbols": list(symbols)}:
            return CharTokenizer(symbols)
        case {"kind": "tiktoken", "name": str(), "pattern": str(), "ranks": dict(), "special": dict()}:
            parts = [saved[key] for key in ("name", "pattern", "ranks", "special")]
            return TiktokenTokenizer(_checked_encoding(*parts))
        case {"kind": "imported", "json": dict(content), "vocab_size": int(vocab_size), "eot": int() | None as eot}:
            more_ends = saved.get("more_ends", [])
            if isinstance(more_ends, list):
                return ImportedTokenizer(content, vocab_size, eot, more_ends)
    kinds = "char (with symbols), byte, or tiktoken or imported (with its vocabulary)"
    raise ValueError(f"not a saved tokenizer: kind must be {kinds}")


def _checked_encoding(name: str, pattern: str, ranks: dict[str, int], special: dict[str, int]) -> tiktoken.Encoding:
    """A tiktoken encoding from its saved parts, checked here because tiktoken aborts on some that do not fit."""
    if not all(isinstance(i, int) and 0 <= i < MAX_VOCAB_SIZE for i in (*ranks.values(), *special.values())):
        raise ValueError(f"tokenizer {name!r}: ids must be whole numbers from 0 to {MAX_VOCAB_SIZE - 1}")
    ids = [*ranks.values(), *{*special.values()}]  # two names may stand for one special token
    if len(set(ids)) != len(ids):
        raise ValueError(f"tokenizer {name!r}: two tokens have the same id")
    try:
        pieces = {base64.b64decode(piece, validate=True): rank for piece, rank in ranks.items()}
    except ValueError as error:
        raise ValueError(f"tokenizer {name!r}: a token is not base64: {error}") from None
    if len(pieces) != len(ranks) or not all(bytes([byte]) in pieces for byte in range(256)):
        raise ValueError(f"tokenizer {name!r}: every byte must be a token, and no token twice")
    try:
        return tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=pieces, special_tokens=special)
    except ValueError as error:
        raise ValueError(f"tokenizer {name!r}: the pattern does not compile: {error}") from None
