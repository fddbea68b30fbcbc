"""A whole training run, nanoGPT's recipe for a CPU, here and by PyTorch: the same weights, batches and rates."""

from functools import partial

import jax
import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from travel import torch_loss

import config_lib
import run_lib
import train_lib
from configs import nanogpt_char_cpu
from input_pipeline import Batches, eval_batches
from interop.models import to_theirs
from training.optimizer import schedule_shape
from transformer.model import init_params


def torch_run(config, model_config, data) -> torch.nn.Module:
    """transformers' GPT-2 class, trained by torch.optim.AdamW from our initial weights; its biases stay zero."""
    init_key, _ = jax.random.split(jax.random.key(config.seed))
    params = jax.jit(partial(init_params, model_config))(init_key)
    theirs, weights = to_theirs(model_config, params)
    settings = {key: theirs[key] for key in theirs if key not in ("model_type", "dtype")}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0))
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=False)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.endswith("bias"))
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, config.lr, config.betas, config.eps, config.weight_decay)
    shape = schedule_shape(config_lib.optimizer_config(config), config.max_steps)
    rates = config.lr * np.asarray(jax.vmap(shape)(np.arange(config.max_steps)), np.float64)
    batches = Batches(data.train, config.context_len, config.batch_size, config.seed, config.order)
    for step, rate in enumerate(rates):
        batch_BT1 = torch.tensor(batches(step), dtype=torch.long)
        logits_BTV = model(batch_BT1[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1), batch_BT1[:, 1:].flatten())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    return model


@pytest.mark.slow
def test_two_thousand_steps(agree, tmp_path):
    """Rounding grows over so many steps, as another seed would: only the loss of the outcome can be compared."""
    config = nanogpt_char_cpu.get_config()
    data = run_lib.load_data(config, print)
    model_config = config_lib.transformer_config(config, data.tokenizer.vocab_size, "float32")
    model = torch_run(config, model_config, data)
    theirs = torch_loss(model, list(eval_batches(data.val, config.context_len, batch_size=64)))
    ours = train_lib.train(config, tmp_path).val_loss
    print(f"validation loss here {ours:.4f}, in torch {theirs:.4f}")
    agree("nanoGPT's recipe in PyTorch", "exact validation loss after 2000 steps", ours, theirs, 3e-3)
