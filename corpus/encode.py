"""Texts to tokens, on one thread or on many."""

from codecs import BOM_UTF8
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from corpus.files import Piece, Task
from corpus.load_text import HOW_TO_GO_ON, decode_text
from corpus.tokenizer import ByteTokenizer, Tokenizer, UnknownCharacters
from runtime.errors import UserError


class Encoded(NamedTuple):
    """A task's tokens, the bytes of their text, and how many documents began in it, and how many were empty."""

    tokens: np.ndarray
    num_bytes: int
    documents: int
    empty: int


def separator(tokenizer: Tokenizer) -> tuple[np.ndarray, int]:
    """The tokens before each document (end-of-text, or else a newline), and how many bytes of text they are."""
    if tokenizer.eot is not None:
        return np.array([tokenizer.eot], tokenizer.dtype), 0
    return tokenizer.encode("\n", replace_unknown=True), 1


def encode(tokenizer: Tokenizer, pieces: list[Piece], unknown: str = "") -> Encoded:
    """The tokens of pieces, a separator before each document that begins in them; empty documents are left out.

    `unknown` says what becomes of characters that a vocabulary from elsewhere lacks: "refuse", "replace" or "drop".
    Raises UserError if a file is not UTF-8, has such characters, or has changed.
    """
    mark, mark_bytes = separator(tokenizer)
    parts, num_bytes, documents, empty = [], 0, 0, 0
    for piece in pieces:
        by_bytes = isinstance(tokenizer, ByteTokenizer)  # which takes any file as it is
        text = piece.data if by_bytes else decode_text(*piece)
        if not text:
            empty += piece.begins
            continue
        if piece.begins:
            parts.append(mark)
            documents, num_bytes = documents + 1, num_bytes + mark_bytes
        marked = not by_bytes and piece.begins and piece.data.startswith(BOM_UTF8)
        size = len(piece.data) - len(BOM_UTF8) * marked
        try:
            parts.append(tokenizer.encode_bytes(piece.data) if by_bytes else tokenizer.encode(text))
        except UnknownCharacters as error:
            if unknown not in ("replace", "drop"):
                ways = HOW_TO_GO_ON if unknown else "it has changed: begin again in another --out"
                raise UserError(f"config.dataset: {piece.path}: {error}; {ways}") from error
            instead = tokenizer.replacement if unknown == "replace" else None
            text = text.translate(dict.fromkeys(map(ord, error.characters), instead))
            parts.append(tokenizer.encode(text))
            size = len(text.encode())
        num_bytes += size
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    return Encoded(tokens, num_bytes, documents, empty)


def without_mark(tokenizer: Tokenizer, first: Encoded) -> Encoded:
    """The tokens with which a corpus begins: its first document has no newline before it."""
    mark, mark_bytes = separator(tokenizer)
    if tokenizer.eot is not None or not first.documents:
        return first
    return first._replace(tokens=first.tokens[len(mark) :], num_bytes=first.num_bytes - mark_bytes)


# --- Many threads ------------------------------------------------------------------------------------------------


def work(
    tokenizer: Tokenizer | None, tasks: Iterable[Task], threads: int, unknown: str = ""
) -> Iterator[tuple[Task, Any]]:
    """Each task with its `Encoded`, or with the set of its characters if there is no tokenizer, in order.

    The libraries of BPE encode without Python's lock, so threads keep all cores busy; characters and bytes take little
    time. At most two tasks for each are in flight, so that results do not pile up. Raises UserError as `encode`.
    """

    def do(pieces: list[Piece]) -> Encoded | set[str]:
        if tokenizer:
            return encode(tokenizer, pieces, unknown)
        return set().union(*(decode_text(*piece) for piece in pieces))

    pool, under_way = ThreadPoolExecutor(threads), deque()
    try:
        for task in tasks:
            under_way.append((task, pool.submit(do, task.pieces)))
            if len(under_way) == 2 * threads:
                task, future = under_way.popleft()
                yield task, future.result()
        for task, future in under_way:
            yield task, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
