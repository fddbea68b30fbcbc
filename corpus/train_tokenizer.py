"""A tokenizer of one's own: byte-level byte-pair encoding, learned from a corpus by the library `tokenizers`."""

from collections.abc import Iterator

import tiktoken
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from corpus.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, END_OF_TURN, OWN, ROLES, TiktokenTokenizer
from runtime.files import parse_json

# Into which pieces a text is split before anything is merged. Both in forms that mean the same to tiktoken's engine,
# with which the tokenizer runs, and to that of the library, by which it learns and others read it.
PATTERNS = {
    # cl100k_base's as tiktoken 0.3 has it (tiktoken_ext/openai_public.py); later ones find the same pieces, faster
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+",
    # GPT-2's own (openai/gpt-2, src/encoder.py)
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
SPECIAL = (END_OF_TEXT, *(f"<|{role}|>" for role in ROLES), END_OF_TURN)
FEWEST = 256 + len(SPECIAL)


def train_tokenizer(texts: Iterator[str], vocab_size: int, split: str) -> TiktokenTokenizer:
    """The 256 bytes, a token for each merge of a pair that occurs twice or more, most frequent first, and SPECIAL.

    The texts are cut where no piece of the pattern `split` is. A small corpus has fewer tokens than `vocab_size`.
    """
    library = tokenizers.Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(tokenizers.Regex(PATTERNS[split]), "isolated")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([pieces, by_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL), min_frequency=2, initial_alphabet=[*BYTE_SYMBOLS], show_progress=False
    )
    library.train_from_iterator(texts, trainer)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in parse_json(library.to_str())["model"]["merges"]:
        ranks.setdefault(bytes(map(BYTE_SYMBOLS.index, "".join(pair))), len(ranks))
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL)}
    encoding = tiktoken.Encoding(OWN, pat_str=PATTERNS[split], mergeable_ranks=ranks, special_tokens=special)
    return TiktokenTokenizer(encoding)
