"""Conversations: their form in tokens, and rows of them, of which only what the assistant says is learned.

A conversation is the end-of-text token, then for each message the token of its role, its text, and the end of the turn.
No text can spell these tokens: where a message writes one out, it is text.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from corpus.dataset import SPLITS, Dataset, Split, Wanted, cached, count_bytes
from corpus.files import RowFiles
from corpus.formats import Bad, Source
from corpus.load_text import find_files, new_tokenizer
from corpus.tokenizer import END_OF_TURN, ROLES, Tokenizer
from runtime.errors import UserError

SYNONYMS = {"human": "user", "gpt": "assistant"}  # the roles of ShareGPT's conversations
OPEN = 64  # rows that are not full yet, in each of which the next conversation may find its place
AT_ONCE = 256  # conversations that are read together

# The same form for `transformers`, which marks by `generation` what is learned.
TEMPLATE = (
    "{{ eos_token }}{% for message in messages %}"
    f"{{% if message['role'] not in {list(ROLES)} %}}"
    f"{{{{ raise_exception('a role must be one of {', '.join(ROLES)}') }}}}{{% endif %}}"
    "{{ '<|' + message['role'] + '|>' }}{% if message['role'] == 'assistant' %}"
    f"{{% generation %}}{{{{ message['content'] + '{END_OF_TURN}' }}}}{{% endgeneration %}}"
    f"{{% else %}}{{{{ message['content'] + '{END_OF_TURN}' }}}}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def require_turns(tokenizer: Tokenizer) -> tuple[int, int]:
    """The tokens with which the assistant's turns begin and end. Raises UserError if the tokenizer lacks such."""
    if tokenizer.answer is None or tokenizer.answer[1] not in tokenizer.ends:
        problem = f"tokenizer {tokenizer.name} has no tokens for the turns of a conversation"
        raise UserError(f"config.chat: {problem}; begin from a model whose tokenizer `main.py tokenizer` made")
    return tokenizer.answer


def conversation_tokens(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
    """The ids of a whole conversation. Raises ValueError if a role is none of ROLES."""
    parts: list[Any] = [[tokenizer.eot]]
    for message in messages:
        if (role := message["role"]) not in ROLES:
            raise ValueError(f"a message's role must be one of {', '.join(ROLES)}, got {role!r}")
        parts += [[tokenizer.special[f"<|{role}|>"]], tokenizer.encode(message["content"])]
        parts += [[tokenizer.special[END_OF_TURN]]]
    return np.concatenate(parts).astype(tokenizer.dtype)


def chat_tokens(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> np.ndarray:
    """The ids up to where the assistant's next words begin. Raises as `require_turns` and `conversation_tokens`."""
    start, _ = require_turns(tokenizer)
    return np.append(conversation_tokens(tokenizer, messages), np.array(start, tokenizer.dtype))


def messages_of(value: Any) -> list[dict[str, str]] | Bad:
    """The messages that a row holds, by role and content; [] of an empty line."""
    if isinstance(value, Bad) or value == "":
        return value or []
    if not isinstance(value, list):
        return Bad("is null" if value is None else f"is no list of messages but {type(value).__name__}")
    messages = []
    for message in value:
        match message:
            case {"role": str(role), "content": str(content)} | {"from": str(role), "value": str(content)}:
                messages.append({"role": SYNONYMS.get(role, role), "content": content})
            case _:
                return Bad('has a message that is no object with a "role" and a "content" of text')
        if messages[-1]["role"] not in ROLES:
            return Bad(f"has a message of {role!r}, which is none of {', '.join(ROLES)}")
    silent = not any(message["role"] == "assistant" for message in messages)
    return Bad("has no message of the assistant") if silent else messages


def pack(conversations: Iterable[np.ndarray], context_len: int, answer_start: int, eot: int) -> tuple[np.ndarray, str]:
    """Rows of `context_len` tokens end to end, and one more `eot`, which also fills the rows; and a line about them.

    A row begins with a conversation and holds whole ones: each goes where it leaves least room. One that is longer
    than a row is cut, or left out if no answer begins in what is left of it.
    """
    rows: list[list[np.ndarray]] = []
    room: dict[int, int] = {}  # of the rows that are not full yet, by number
    total = cut = left_out = 0
    for ids in conversations:
        total, cut = total + 1, cut + (len(ids) > context_len)
        if not (ids[: context_len - 1] == answer_start).any():
            left_out += 1
            continue
        ids = ids[:context_len]
        number = min((n for n, free in room.items() if free >= len(ids)), key=room.__getitem__, default=len(rows))
        if number == len(rows):
            if len(room) == OPEN:
                del room[min(room, key=room.__getitem__)]
            rows.append([])
            room[number] = context_len
        rows[number].append(ids)
        room[number] -= len(ids)
    packed = np.full(len(rows) * context_len + 1, eot, np.int64)
    for start, row in zip(range(0, len(packed), context_len), rows, strict=False):
        joined = np.concatenate(row)
        packed[start : start + len(joined)] = joined
    full = sum(map(len, (ids for row in rows for ids in row))) / max(1, len(packed) - 1)
    told = f"{total:,} conversations in {len(rows):,} rows of {context_len:,} tokens, {full:.0%} full"
    if cut or left_out:
        told += f"; {cut:,} longer than that are cut, and {left_out:,} left out, in which no answer begins before"
    return packed, told


def are_answers(inputs: Any, targets: Any, start: int, end: int, eot: int, xp: Any, highest: Callable) -> Any:
    """Whether each target is of an answer: after its start, up to its end, which is one too.

    Inputs and targets are [B, T], the latter a token further. `xp` is numpy or jax.numpy, and `highest` gives the
    highest of those before, along the second axis.
    """
    place = 2 * xp.arange(inputs.shape[1])
    mark = xp.where(inputs == start, place + 1, xp.where((inputs == end) | (inputs == eot), place, 0))
    return (highest(mark) % 2 == 1) & (targets != eot)  # the last mark is odd: an answer has begun


@dataclass(frozen=True)
class ConversationSplit(Split):
    """A split of `pack`; of its tokens the assistant's alone are predicted, and only their bytes count."""

    context_len: int = 1
    answer: tuple[int, int] = (-1, -1)
    unpredicted = 0

    def bytes_of(self, num_tokens: int, tokenizer: Tokenizer) -> int:
        """The bytes of the first `num_tokens` tokens that are predicted."""
        answers = self.tokens[1:][self.in_answers()]
        return count_bytes(answers, min(num_tokens, len(answers)), tokenizer)

    def in_answers(self) -> np.ndarray:
        """Whether each token but the first is predicted."""
        inputs, targets = (np.reshape(x, (-1, self.context_len)) for x in (self.tokens[:-1], self.tokens[1:]))
        highest = partial(np.maximum.accumulate, axis=1)
        return are_answers(inputs, targets, *self.answer, self.tokens[0], np, highest).ravel()


def load_conversations(wanted: Wanted) -> Dataset:
    """Packs the conversations of each split, or takes the rows from the cache.

    `text_column` holds a list of messages: objects with `role` and `content`, or with `from` and `value`. Raises
    UserError if the files cannot be read, hold no rows or bad ones, a split is empty, or the tokenizer is for texts.
    """
    context_len, say = wanted.context_len, wanted.say
    vocabulary = wanted.vocabulary or new_tokenizer(wanted.tokenizer, wanted.data_dir, say, " ")
    answer = require_turns(vocabulary)
    sources = [Source(path) for path in find_files(wanted.dataset, wanted.data_dir, say)]
    if text := next((source.path for source in sources if not source.has_rows), None):
        raise UserError(f"config.dataset: {text} has no rows; give conversations as a .jsonl, a line each")
    files = RowFiles(sources, wanted, messages_of)
    digest = hashlib.sha256()
    for source in sources:
        for chunk in source.chunks():
            digest.update(chunk)

    def tokens_of(name: str, start: int, stop: int) -> np.ndarray:
        bad: list[str] = []

        def conversations() -> Iterator[np.ndarray]:
            for at in range(start, stop, AT_ONCE):
                pieces, wrong = files.pieces(at, min(at + AT_ONCE, stop))
                bad.extend(wrong)
                yield from (conversation_tokens(vocabulary, piece.data) for piece in pieces if piece.data)

        packed, told = pack(conversations(), context_len, answer[0], vocabulary.eot)
        say(f"{name}: {told}")
        if bad:
            say(f"warning: {len(bad):,} bad rows are left out; the first is {bad[0]}")
        if len(packed) == 1:
            none = f"no conversation in the {name} split that fits into config.context_len={context_len}"
            raise UserError(f"config.dataset: {wanted.dataset} has {none}; give more of them, or other fractions")
        return packed.astype(vocabulary.dtype)

    splits = {}
    ends = [files.size] if wanted.whole else files.ends(wanted.val_fraction, wanted.test_fraction)
    for (name, word), (start, stop) in zip(SPLITS.items(), pairwise([0, *ends]), strict=False):
        if name == "test" and start == stop:
            continue
        rows = wanted.text_column, wanted.skip_bad_rows, start, stop
        key = digest.hexdigest(), vocabulary.fingerprint, context_len, *rows
        path = wanted.cache / f"{hashlib.sha256(str(key).encode()).hexdigest()[:32]}-chat.npy"
        make = partial(tokens_of, "whole text" if wanted.whole else word, start, stop)
        tokens = cached(path, vocabulary.dtype, make, say)
        splits[name] = ConversationSplit(tokens, None, (), context_len, answer)
    if wanted.whole:
        splits = dict.fromkeys(SPLITS, splits["train"])
    return Dataset(splits["train"], splits["val"], splits.get("test"), vocabulary, digest.hexdigest())
