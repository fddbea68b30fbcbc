"""Documents packed into one sequence: with `mask_documents` none sees another."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import finished_run, tiny_config

import config_lib
import run_lib
import train_lib
from corpus.dataset import Dataset, Split
from runtime.errors import UserError
from training.loss import batch_loss
from transformer import TransformerConfig
from transformer.model import model_of

EOT, V, T = 3, 17, 23
SMALL = TransformerConfig(
    *(V, T, 4, 6, 3, 24, 0, 40), position="rope", sliding_window=5, window_pattern="LG", document_start=EOT
)
FORMS = {
    "plain": {"attention_kernel": "plain"},
    "chunked": {"attention_kernel": "chunked"},
    "in a loop, computed again": {"scan_blocks": True, "remat": "block", "attention_kernel": "chunked"},
}


def packed(seed: int) -> np.ndarray:
    """[2, T]: the end of a document, then whole ones that begin at 9 and 13 or at 4, with the token EOT."""
    tokens_BT = np.random.default_rng(seed).integers(EOT + 1, V, (2, T))
    tokens_BT[0, [9, 13]] = tokens_BT[1, 4] = EOT
    return tokens_BT


@pytest.mark.parametrize("form", FORMS)
def test_a_documents_logits_do_not_depend_on_the_one_before(random_params, form):
    config = dataclasses.replace(SMALL, **FORMS[form])
    params = random_params(config)
    logits = jax.jit(model_of(config, params).__call__)
    before, other = packed(0), packed(1)
    other[0, 9:], other[1, 4:] = before[0, 9:], before[1, 4:]
    one, two = np.asarray(logits(before)), np.asarray(logits(other))
    assert (one[0, 9:] == two[0, 9:]).all() and (one[1, 4:] == two[1, 4:]).all()
    assert (one[0, :9] != two[0, :9]).any(-1).all() and (one[1, :4] != two[1, :4]).any(-1).all()
    alone = np.asarray(logits(np.roll(before[:1], -13, axis=1)))  # the last document at the front: rotary positions
    np.testing.assert_allclose(one[0, 13:], alone[0, : T - 13], rtol=0, atol=2e-5)  # only see distances
    masked, free = one, np.asarray(model_of(dataclasses.replace(config, document_start=-1), params)(before))
    assert np.abs(masked[0, 10:] - free[0, 10:]).max() > 1e-2
    assert np.abs(masked[0, :9] - free[0, :9]).max() < 2e-5  # before the first border nothing changes


def test_the_gradient_of_packed_documents_is_the_sum_of_theirs(random_params):
    """Of a batch that holds each document alone, the targets of the others left out."""
    params, batch_1T1 = random_params(SMALL), packed(2)[:1]
    grads = lambda config, batch: jax.jit(
        jax.grad(lambda params: batch_loss(config, params, jnp.asarray(batch), None)[0])
    )(params)
    apart = np.full((3, T), -1)  # the token that ends a document is predicted in it, and begins the next
    for row, (start, stop) in enumerate([(0, 9), (9, 13), (13, T - 1)]):
        apart[row, : stop - start + 1] = batch_1T1[0, start : stop + 1]
    unmasked = dataclasses.replace(SMALL, document_start=-1)
    want, have = grads(unmasked, apart), grads(SMALL, batch_1T1)
    for name, gradient in want.items():
        assert float(jnp.linalg.norm(have[name] - gradient)) <= 3e-6 * float(jnp.linalg.norm(gradient)), name


def test_a_text_without_separators_is_refused_and_an_earlier_run_is_warned():
    data = Dataset(*(Split(np.arange(9), 9) for _ in range(3)), SimpleNamespace(eot=9), "")
    config = tiny_config(mask_documents=True)
    with pytest.raises(UserError, match=r"^config\.mask_documents: .* has no end-of-text token .*; set it to False"):
        run_lib.require_documents(config, data, None)
    warned: list[str] = []
    run_lib.require_documents(config, data, warned.append)
    assert len(warned) == 1 and "so nothing is masked" in warned[0]
    run_lib.require_documents(config, dataclasses.replace(data, tokenizer=SimpleNamespace(eot=8)), None)
    run_lib.require_documents(tiny_config(), data, None)


@pytest.mark.parametrize("begun", [False, True])
def test_training_asks_for_separators(tmp_path, monkeypatch, begun):
    asked, source = [], finished_run().workdir
    monkeypatch.setattr(run_lib, "require_documents", lambda config, data, warn: asked.append(warn is not None))
    if begun:
        shutil.copytree(source, tmp_path / "run")
    train_lib.train(tiny_config(max_steps=30 if begun else 1, sample_tokens=1), tmp_path / "run")
    assert asked == [begun]


def test_a_tokenizer_without_an_end_of_text_token_is_refused():
    config = tiny_config(mask_documents=True)
    config_lib.check(config)
    with pytest.raises(UserError, match=r"^config\.mask_documents: tokenizer char has no end-of-text token .*; set it"):
        config_lib.model_config_of(config, 65, None)
    assert config_lib.model_config_of(config, 65, 7).document_start == 7
    config.mask_documents = False
    assert config_lib.model_config_of(config, 65, 7).document_start == -1
