"""Tokenizers in the format of the library `tokenizers`, tokenizer.json, both ways: the same ids and the same text."""

import base64
import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from corpus.chat import TEMPLATE
from corpus.tokenizer import (
    BYTE_SYMBOLS,
    END_OF_TEXT,
    MAX_VOCAB_SIZE,
    ByteTokenizer,
    CharTokenizer,
    ImportedTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    without_dropout,
)
from runtime.errors import one_line
from runtime.files import parse_json


def to_tokenizers(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer as one of the library; its `to_str` is the content of tokenizer.json.

    Ids and text are the same, but that `char` replaces unknown characters; that special tokens written in a text become
    their ids (of two names the first's) unless `encode_special_tokens` is set; and that an imported one may add special
    tokens unless `add_special_tokens` is false. In `byte`, 255, which UTF-8 never uses, ends a text. Raises ValueError
    if the vocabulary cannot be written so.
    """
    match tokenizer:
        case CharTokenizer():
            return _of_symbols(tokenizer.symbols, tokenizer.replacement)
        case ByteTokenizer():
            return _byte_level({bytes([byte]): byte for byte in range(255)}, {END_OF_TEXT: 255}, None)
        case TiktokenTokenizer():
            saved = tokenizer.to_dict()
            ranks = {base64.b64decode(piece): rank for piece, rank in saved["ranks"].items()}
            return _byte_level(ranks, saved["special"], saved["pattern"])
        case ImportedTokenizer():
            return tokenizers.Tokenizer.from_str(json.dumps(without_dropout(tokenizer.to_dict()["json"])))
    raise TypeError(f"tokenizer.json has no form for a {type(tokenizer).__name__}")


def hf_tokenizer_config(tokenizer: Tokenizer, chat: bool = False) -> dict[str, Any]:
    """The content of tokenizer_config.json, for `transformers.AutoTokenizer`; if `chat`, also the form of chats."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # The next two are the defaults of version 5. In version 4, some turned " ." into ".", and GPT-2 got token
        # types, which it adds to its embeddings.
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    match tokenizer:
        case CharTokenizer() | ByteTokenizer():  # lm-eval needs all three; decoding may leave them out
            end = min(tokenizer.symbols, key=_how_missed) if isinstance(tokenizer, CharTokenizer) else END_OF_TEXT
            config |= dict.fromkeys(["bos_token", "eos_token", "pad_token"], end)
        case ImportedTokenizer(eot=int(eot)):
            config["eos_token"] = to_tokenizers(tokenizer).id_to_token(eot)
        case TiktokenTokenizer(eot=int(eot)):
            config["eos_token"] = tokenizer.decode([eot])
    return config | ({"chat_template": TEMPLATE} if chat else {})


def _how_missed(symbol: str) -> tuple[int, int]:
    """A sort key: the symbol that a text would miss least comes first."""
    if symbol.isspace():
        return 3, ord(symbol)
    if symbol.isalnum():
        return 2, -ord(symbol)
    return int(symbol in "'\"!(),-.:;?"), ord(symbol)


def from_tokenizers(
    json_text: str,
    vocab_size: int,
    eot: int | None,
    more_ends: Sequence[int] = (),
    say: Callable[[str], None] = lambda line: None,
) -> Tokenizer:
    """The tokenizer of a tokenizer.json: `char` or `byte` if it is exactly what `to_tokenizers` makes of one.

    `vocab_size`, `eot` and `more_ends` are those of `ImportedTokenizer`; `say` takes a line about what is not imported.
    Raises ValueError if the content cannot be read, or does not fit them.
    """
    try:
        content = parse_json(json_text)
    except ValueError as error:
        raise ValueError(f"the tokenizer {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"a tokenizer should be a JSON object, not a {type(content).__name__}")
    # truncation and padding may have been set when it was saved; they are no part of the tokenizer
    if (steady := without_dropout(content)) is not content:
        say(f"its tokenizer leaves out merges at random (dropout {content['model']['dropout']}); here it never does")
    imported = ImportedTokenizer(steady | {"truncation": None, "padding": None}, vocab_size, eot, more_ends)
    written = to_tokenizers(imported).to_str()
    earlier = _byte_level({bytes([byte]): byte for byte in range(256)}, {}, None)  # what `byte` was exported as before
    own = [(ByteTokenizer(), library) for library in (to_tokenizers(ByteTokenizer()), earlier)]
    match content:
        case {"model": {"vocab": dict(vocabulary)}} if all(len(token) == 1 for token in vocabulary):
            char = CharTokenizer(sorted(vocabulary, key=vocabulary.__getitem__))
            own += [(char, to_tokenizers(char))]
    for ours, library in own:
        if library.to_str() == written and (ours.vocab_size, ours.ends) == (vocab_size, imported.ends):
            return ours
    return imported


def _of_symbols(symbols: tuple[str, ...], replacement: str) -> tokenizers.Tokenizer:
    """One token for each character: byte-pair encoding without merges."""
    for symbol in symbols:
        if "\ud800" <= symbol <= "\udfff":
            raise ValueError(f"tokenizer.json cannot hold the lone surrogate {symbol!a} of the vocabulary")
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token=replacement))
    library.decoder = decoders.Fuse()
    return library


def _byte_level(ranks: dict[bytes, int], special: dict[str, int], pattern: str | None) -> tokenizers.Tokenizer:
    """Byte-pair encoding of the bytes of each piece that `pattern` finds (of the whole text if None)."""
    names = {piece: piece.decode("latin-1").translate(BYTE_SYMBOLS) for piece in ranks}
    vocabulary = {names[piece]: rank for piece, rank in ranks.items()}
    first_names: dict[int, str] = {}
    for name, i in special.items():
        first_names.setdefault(i, name)
    special = {name: i for i, name in first_names.items()}  # the format has one name for an id
    if twice := vocabulary.keys() & special.keys():
        raise ValueError(f"tokenizer.json cannot hold {min(twice)!r} both as a special token and as a plain one")
    longer = [piece for piece in sorted(ranks, key=ranks.__getitem__) if len(piece) > 1]
    merges = (parts for piece in longer if len(parts := _last_parts(piece, ranks)) == 2)
    pairs = [(names[left], names[right]) for left, right in merges]
    # Tiktoken looks for a whole piece first, which matters only if merges would not lead to the same token.
    library = tokenizers.Tokenizer(models.BPE(vocabulary | special, pairs, ignore_merges=len(pairs) < len(longer)))
    library.add_special_tokens(list(special))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if pattern is None:
        library.pre_tokenizer = to_bytes
    else:
        split = pre_tokenizers.Split(_regex(pattern), "removed", invert=True)  # all but what it finds
        library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    library.decoder = decoders.ByteLevel()
    return library


def _last_parts(piece: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The parts of a token before its last merge: two, or more if merging never leads to it.

    Tiktoken merges any pair that makes the token of the lowest rank, a tokenizer.json only the pairs that it lists.
    Merges within a span do not depend on the text around it, so each token needs only one pair.
    """
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while len(parts) > 2:
        joined = [left + right for left, right in pairwise(parts)]
        best = min(range(len(joined)), key=lambda i: ranks.get(joined[i], MAX_VOCAB_SIZE))
        if joined[best] not in ranks:
            break
        parts[best : best + 2] = [joined[best]]
    return parts


# An atom of a regular expression (each parenthesis by itself) and a possessive count after it.
_ATOM = re.compile(r"(\\[pPxu]\{[^}]*\}|\\.|\[(?:\\.|[^\]\\])*\]|.)(?:(\{\d+(?:,\d*)?\})\+)?", re.DOTALL)


def _regex(pattern: str) -> tokenizers.Regex:
    """A pattern of tiktoken's engine, fancy-regex, rewritten for the library's, Oniguruma with Ruby's syntax.

    In the latter `x{1,3}+` repeats `x{1,3}` and is not possessive, and `$` matches at the end of any line, not only of
    the text. Raises ValueError if the pattern cannot be rewritten.
    """

    def rewrite(match: re.Match[str]) -> str:
        atom, count = match.groups()
        if count is None:
            return {"^": r"\A", "$": r"\z"}.get(atom, atom)
        if atom == ")":
            raise ValueError(f"tokenizer.json cannot hold a possessive count of a group: {pattern}")
        return f"(?>{atom}{count})"

    rewritten = _ATOM.sub(rewrite, pattern)
    try:
        return tokenizers.Regex(rewritten)
    except Exception as error:  # the library raises no other class
        raise ValueError(f"tokenizer.json cannot hold the pattern {pattern}: {one_line(error)}") from None
