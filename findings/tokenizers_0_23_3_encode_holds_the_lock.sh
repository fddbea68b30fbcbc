#!/usr/bin/env bash
# tokenizers 0.23.3: `encode` of one long text holds Python's lock (GIL) from its first to its last moment, though all of
# its work is Rust's, so threads that each encode a text take turns, and a progress bar or a server stands still for as
# long. `encode_batch` of a list with that one text gives the same ids and lets other threads run. One would expect both
# to release it, as tiktoken 0.13's `encode` does.
# Seen on 2026-11-29, Python 3.11 on Linux x86_64, on busy cores: the other thread's longest pause was 87 to 93 % of the
# call under `encode`, 6 to 8 % under `encode_batch`, 17 to 29 % under tiktoken's.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"${PYTHON:-python3}" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install tokenizers==0.23.3 tiktoken==0.13.0 2>/dev/null
cat >"$folder/try.py" <<'PYTHON'
import random
import threading
import time

import tiktoken
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

draw = random.Random(0)
words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 9))) for _ in range(5000)]
text = " ".join(draw.choices(words, k=60_000))
own = Tokenizer(models.BPE())
own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
own.train_from_iterator([" ".join(words)], trainer)
ranks = {bytes([i]): i for i in range(256)} | {b"%c%c" % pair: 256 + i for i, pair in enumerate([(97, 98), (99, 100)])}
other = tiktoken.Encoding("small", pat_str=r" ?[a-z]+", mergeable_ranks=ranks, special_tokens={})


def pause(call):
    """The longest pause of this thread while another one makes the call, as a share of the call."""
    seconds = []

    def work():
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)

    thread, longest, last = threading.Thread(target=work), 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        time.sleep(0.001)
    return min(1.0, max(longest, time.perf_counter() - last) / seconds[0])


assert own.encode(text).ids == own.encode_batch([text])[0].ids
calls = {
    "encode": lambda: own.encode(text),
    "encode_batch": lambda: own.encode_batch([text]),
    "tiktoken": lambda: other.encode_ordinary(text),
}
found = {name: min(pause(call) for _ in range(3)) for name, call in calls.items()}
print(", ".join(f"{name}: another thread pauses for {share:.0%} of the call" for name, share in found.items()))
raise SystemExit(not (found["encode"] > 0.7 and found["encode_batch"] < 0.5 and found["tiktoken"] < 0.5))
PYTHON
"$folder/environment/bin/python" "$folder/try.py" || { echo "this has changed"; exit 1; }
