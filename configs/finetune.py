"""Go on from the weights of a run, imported or trained here, on a text of your own.

python main.py --config=configs/finetune.py:RUN --config.dataset=FILE [--workdir=DIRECTORY]

The model and the tokenizer are RUN's. The rest is a careful beginning: AdamW alone at a small rate, a short warm-up, a
cosine to zero, one pass over the text.
"""

from dataclasses import fields
from pathlib import Path

from configs import default
from runtime.errors import UserError
from runtime.files import read_json
from transformer.config import TransformerConfig


def get_config(run: str = "", name: str = "finetune", also: tuple[str, ...] = ()):
    """`also` names more keys that are RUN's."""
    if not run:
        raise UserError(f"--config=configs/{name}.py: needs a run to start from; write configs/{name}.py:RUN")
    config = default.get_config()
    settings = read_json(Path(run) / "config.json").get("config")
    if not isinstance(settings, dict):
        raise UserError(f"{run}: is no run's directory; make one of it with python main.py import --from={run} first")
    config.lr = 1e-4
    kept = {"tokenizer", *also, *(field.name for field in fields(TransformerConfig))}
    config.update({key: value for key, value in settings.items() if key in kept})
    config.init_from = run
    config.use_muon = False
    config.schedule = "cosine"
    config.lr_warmup_ratio = 0.05

    config.batch_size = 8
    config.epochs = 1
    config.eval_every = 100
    config.save_every = 100
    return config
