"""Texts to tokens, in this process or in many."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import numpy as np

from corpus.files import Piece, Task
from corpus.load_text import HOW_TO_GO_ON, decode_text
from corpus.tokenizer import ByteTokenizer, Tokenizer, UnknownCharacters, tokenizer_from_dict
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
        try:
            parts.append(tokenizer.encode_bytes(piece.data) if by_bytes else tokenizer.encode(text))
        except UnknownCharacters as error:
            if unknown not in ("replace", "drop"):
                ways = HOW_TO_GO_ON if unknown else "it has changed: begin again in another --out"
                raise UserError(f"config.dataset: {piece.path}: {error}; {ways}") from error
            instead = tokenizer.replacement if unknown == "replace" else None
            text = text.translate(dict.fromkeys(map(ord, error.characters), instead))
            parts.append(tokenizer.encode(text))
        num_bytes += len(text if by_bytes else text.encode())
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    return Encoded(tokens, num_bytes, documents, empty)


def without_mark(tokenizer: Tokenizer, first: Encoded) -> Encoded:
    """The tokens with which a corpus begins: its first document has no newline before it."""
    mark, mark_bytes = separator(tokenizer)
    if tokenizer.eot is not None or not first.documents:
        return first
    return first._replace(tokens=first.tokens[len(mark) :], num_bytes=first.num_bytes - mark_bytes)


# --- Many processes -----------------------------------------------------------------------------------------------

_tokenizer: Tokenizer | None = None  # a worker's, which is sent once and not with each task


def _start_worker(saved: dict[str, Any] | None) -> None:
    global _tokenizer  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone reacts to Ctrl-C

    def follow() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()  # a killed parent cannot tell its workers to end
    _tokenizer = tokenizer_from_dict(saved) if saved else None


def _work(pieces: list[Piece], unknown: str, tokenizer: Tokenizer | None = None) -> Encoded | set[str]:
    if tokenizer := tokenizer or _tokenizer:
        return encode(tokenizer, pieces, unknown)
    return set().union(*(decode_text(*piece) for piece in pieces))


def work(
    tokenizer: Tokenizer | None, tasks: Iterable[Task], processes: int, unknown: str = ""
) -> Iterator[tuple[Task, Any]]:
    """Each task with its `Encoded`, or with the set of its characters if there is no tokenizer, in order.

    With `processes` 1 this process does the work. Otherwise at most two tasks for each worker are in flight, so that
    results do not pile up. Raises UserError as `encode`, or if a worker was killed.
    """
    if processes == 1:
        for task in tasks:
            yield task, _work(task.pieces, unknown, tokenizer)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer and tokenizer.to_dict(),))
    under_way: deque = deque()
    try:
        for task in tasks:
            under_way.append((task, pool.submit(_work, task.pieces, unknown)))
            if len(under_way) == 2 * processes:
                task, future = under_way.popleft()
                yield task, future.result()
        for task, future in under_way:
            yield task, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            f"--processes={processes}: a worker was killed, perhaps for want of memory; run the same command again, "
            "with fewer if need be"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
