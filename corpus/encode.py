"""Encodes spans of files, in this process or in many."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from corpus.files import ParquetRows, Span, Task, open_file
from corpus.load_text import decode_text
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


def encode(tokenizer: Tokenizer, text_column: str, spans: list[Span]) -> Encoded:
    """The tokens of spans, with a separator before each document that begins there; empty documents are left out.

    Raises UserError if a file cannot be read, is not UTF-8, or has changed.
    """
    mark, mark_bytes = separator(tokenizer)
    parts, num_bytes, documents, empty = [], 0, 0, 0
    for begins, data, path, start in _pieces(text_column, spans):
        by_bytes = isinstance(tokenizer, ByteTokenizer)  # which takes any file as it is
        text = data if by_bytes else decode_text(path, data, start)
        if not text:
            empty += begins
            continue
        if begins:
            parts.append(mark)
            documents, num_bytes = documents + 1, num_bytes + mark_bytes
        try:
            parts.append(tokenizer.encode_bytes(data) if by_bytes else tokenizer.encode(text))
        except UnknownCharacters as error:
            raise UserError(f"{path}: {error}: it has changed; begin again in another --out") from error
        num_bytes += len(text if by_bytes else text.encode())
    tokens = np.concatenate(parts) if parts else np.empty(0, tokenizer.dtype)
    return Encoded(tokens, num_bytes, documents, empty)


def symbols(text_column: str, spans: list[Span]) -> set[str]:
    """The different characters of spans. Raises UserError as `encode`."""
    pieces = _pieces(text_column, spans)
    return {symbol for _, data, path, start in pieces for symbol in set(decode_text(path, data, start))}


def _pieces(text_column: str, spans: list[Span]) -> Iterator[tuple[bool, bytes, Path, int]]:
    """For each piece of text: whether a document begins with it, its bytes, its file, and its first byte there."""
    for path, start, stop, group in spans:
        if group is None:
            with open_file(path) as file:
                file.seek(start)
                yield start == 0, file.read(stop - start), Path(path), start
        else:
            for text in _row_group(path, text_column, group)[start:stop]:
                yield True, text, Path(path), 0


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int) -> list[bytes]:
    return ParquetRows(Path(path), column).texts(group)


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


def _work(text_column: str, spans: list[Span]) -> Encoded | set[str]:
    return encode(_tokenizer, text_column, spans) if _tokenizer else symbols(text_column, spans)


def work(
    tokenizer: Tokenizer | None, text_column: str, tasks: Iterable[Task], processes: int
) -> Iterator[tuple[Task, Any]]:
    """Each task with its `Encoded`, or with its `symbols` if there is no tokenizer, in order.

    With `processes` 1 this process does the work. Otherwise at most two tasks for each worker are in flight, so that
    results do not pile up. Raises UserError as `encode`, or if a worker was killed.
    """
    if processes == 1:
        for task in tasks:
            yield task, encode(tokenizer, text_column, task.spans) if tokenizer else symbols(text_column, task.spans)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer and tokenizer.to_dict(),))
    under_way: deque = deque()
    try:
        for task in tasks:
            under_way.append((task, pool.submit(_work, text_column, task.spans)))
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
