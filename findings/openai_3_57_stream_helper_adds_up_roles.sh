#!/usr/bin/env bash
# In a streamed chat completion each chunk has a `delta`, whose fields the API's reference allows in every chunk. A server
# that repeats "role": "assistant" in all of them sends what the schema permits, and a client that prints the pieces shows
# the right text. The stream helper of OpenAI's own Python client puts the pieces of every string field together, the role
# too: of three such chunks the finished message has the role "assistantassistantassistant". Nothing is raised; the
# conversation fails at its next turn, when that message is sent back and its role is refused. One would expect a field
# with a fixed set of values to be taken once, as `index` and `type` are. So a server has to send the role in the first
# chunk of each choice alone.
# Seen on 2026-11-30, Python 3.11 on Linux x86_64: openai 3.57.0.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python=${PYTHON:-python3.11}
"$python" -m venv "$folder/environment"
"$folder/environment/bin/python" -m pip --quiet --disable-pip-version-check install openai==3.57.0

cat >"$folder/program.py" <<'PYTHON'
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk


def finished(*deltas):
    state = ChatCompletionStreamState()
    for number, delta in enumerate(deltas, start=1):
        reason = "stop" if number == len(deltas) else None
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        state.handle_chunk(ChatCompletionChunk.model_validate(head | {"choices": [choice]}))
    message = state.get_final_completion().choices[0].message
    return f"{message.role}: {message.content}"


words = [{"content": word} for word in ("one ", "two ", "three")]
print("repeated", finished(*({"role": "assistant"} | word for word in words)))
print("once", finished({"role": "assistant", "content": ""}, *words))
PYTHON

output=$("$folder/environment/bin/python" "$folder/program.py")
echo "$output"
[[ $output == "repeated assistantassistantassistant: one two three"$'\n'"once assistant: one two three" ]] ||
    { echo "this has changed"; exit 1; }
