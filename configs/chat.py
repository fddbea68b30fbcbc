"""Teach a run to converse: go on from its weights with conversations, learning what the assistant says.

python main.py --config=configs/chat.py:RUN --config.dataset=FILE.jsonl [--workdir=DIRECTORY]

RUN's tokenizer has to be one that `main.py tokenizer` made: it has the tokens around the turns. A line of FILE is
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}. The rest is as in
configs/finetune.py, with three passes over the conversations, at RUN's own rate: the tokens around the turns are new to
it. After 35 steps on 600 made-up conversations, from a short run of configs/stories.py, val_loss was 0.97 at its 0.002
and 3.2 at finetune.py's 0.0001. Not measured on a corpus of real ones, nor from a RUN of another rate: AdamW trains all
arrays here, so after a high one set --config.lr. A run begun at another rate goes on with that flag too.
"""

from configs import finetune


def get_config(run: str = ""):
    config = finetune.get_config(run, "chat", also=("lr",))
    config.chat = True
    config.mask_documents = True
    config.text_column = "messages"
    config.epochs = 3
    config.sample_prompt = "Hello!\n"
    return config
