"""Requests in one decode loop: each text is the one that it would be alone."""

import random
import time

import numpy as np
import pytest
from engines import CONFIG, Asked, alone, hold
from test_sampling import CONFIGS, C, all_logits, prompts, recompute

from reports.sinks import measure, sink_shares_by_position
from serving import engine as engine_module
from serving.engine import Engine, Full, Request
from transformer.model import model_of, params_of
from transformer.sampling import Sampling


def assert_written(engine, wanted):
    """`wanted`: of each text its prompt, settings, and tokens. They join and leave while others are written."""
    for seed in range(2):
        asked = [Asked(prompt, len(t), how, alternatives=i % 3) for i, (prompt, how, t) in enumerate(wanted)]
        random.Random(seed).shuffle(order := list(range(len(asked))))
        for i in order:
            engine.submit(asked[i].request)
            time.sleep(0.002 * (i % 4))
        assert [one.wait() for one in asked] == [tokens for _, _, tokens in wanted]
        assert {one.finish for one in asked} == {"length"}


@pytest.mark.once
@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_equals_recomputation_whatever_else_is_written(name, random_params):
    """Of different lengths, over refills of the context."""
    model = model_of(CONFIGS[name], random_params(CONFIGS[name]))
    ids, counts = prompts(1, 9, C, 17, C - 1, 5, 2, 20), (70, 3, 40, 25, 1, 33, 70, 16)
    texts = zip(ids, recompute(model, ids, 70).tolist(), counts, strict=True)
    with Engine(model, rows=3) as engine:
        assert_written(engine, [(prompt, Sampling(0), tokens[:count]) for prompt, tokens, count in texts])


@pytest.mark.once
def test_a_drawn_text_is_that_of_sample_whatever_else_is_written(engine, model):
    cases = zip(prompts(5, 8, 6), (30, 19, 1), strict=True)
    texts = [(prompt, count, Sampling(0.9, top_p=0.95, seed=seed)) for seed, (prompt, count) in enumerate(cases)]
    assert_written(engine, [(prompt, how, alone(model, prompt, count, how)) for prompt, count, how in texts])


def test_requests_of_all_settings_run_the_program_that_is_compiled_first():
    """By the types of what it takes: a temperature of 0, an int, would be another program than one of 0.7."""
    settings = Sampling(0), Sampling(0.7, top_p=0.9), Sampling(1, top_p=1)
    types = lambda how: [array.dtype for array in engine_module._rows([Request([1], 1, how, print)])]
    assert all(types(how) == types(settings[0]) for how in settings)


def test_log_probabilities_are_the_models_own(engine, model):
    prompt = [3, 1, 4, 1]
    told, untold = Asked(prompt, 9, Sampling(0), alternatives=4), Asked(prompt, 9, Sampling(0))
    engine.submit(told.request, untold.request)
    ids = told.wait()
    assert untold.wait() == ids and all(token.alternatives == [] for token in untold.tokens)
    logits_TV = np.array(all_logits(CONFIG, params_of(model), np.array([[*prompt, *ids]])))[0, len(prompt) - 1 : -1]
    logits_TV[:, 5] = -np.inf
    want_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    for token, want_V in zip(told.tokens, want_TV, strict=True):
        best = np.argsort(-want_V)[:4]
        assert [other for other, _ in token.alternatives] == best.tolist() and token.id == best[0]
        np.testing.assert_allclose([value for _, value in token.alternatives], want_V[best], atol=2e-5)
        assert token.log_prob == token.alternatives[0][1]


def test_an_end_is_delivered_and_ends_the_text(engine, model):
    engine.submit((free := Asked([7], 20, Sampling(0))).request)
    end = free.wait()[6]
    with Engine(model, ends=(end,), unsampled=[5], rows=3) as engine:
        engine.submit((asked := Asked([7], 20, Sampling(0))).request)
        assert asked.wait() == free.wait()[: free.wait().index(end) + 1] and asked.finish == "stop"


def test_as_many_wait_as_may_and_a_failure_is_told(model, monkeypatch):
    warned = []
    with Engine(model, rows=3, queue=3, warn=warned.append) as engine:
        held = hold(engine)
        asked = [Asked([1], 30, Sampling(0)) for _ in range(6)]
        engine.submit(*(one.request for one in asked))
        with pytest.raises(Full):
            engine.submit(Asked([1], 1, Sampling(0)).request)
        asked[0].request.cancelled = True
        real = engine_module._decode

        def fail(*_, **__):
            monkeypatch.setattr(engine_module, "_decode", real)
            raise RuntimeError("no memory")

        monkeypatch.setattr(engine_module, "_decode", fail)
        held.set()
        texts = [one.wait() for one in asked[1:]]
        assert [one.finish for one in asked] == [None, *["error"] * 3, "length", "length"] and not asked[0].tokens
        assert texts[3] == texts[4] and len(texts[3]) == 30
        assert warned == ["a chunk of text failed: RuntimeError: no memory"]


def test_who_no_longer_waits_takes_no_place(model):
    with Engine(model, rows=1, queue=2) as engine:
        held = hold(engine)
        assert engine.places == 3
        first = [Asked([1], 5, Sampling(0)) for _ in range(3)]
        engine.submit(*(one.request for one in first))
        with pytest.raises(Full):
            engine.submit(Asked([1], 5, Sampling(0)).request)
        first[0].request.cancelled = first[2].request.cancelled = True
        more = [Asked([1], 5, Sampling(0)) for _ in range(2)]
        engine.submit(*(one.request for one in more))
        held.set()
        assert first[1].wait() == more[0].wait() == more[1].wait()
        assert not first[0].tokens and not first[2].tokens


def test_a_failure_without_a_new_cache_ends_the_engine(model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no memory")

    asked = [Asked([1], 30, Sampling(0)) for _ in range(3)]
    with pytest.raises(RuntimeError, match="no memory"), Engine(model, rows=3) as engine:
        monkeypatch.setattr(engine_module, "_decode", fail)
        monkeypatch.setattr(engine, "_clear", fail)
        engine.submit(*(one.request for one in asked))
        for one in asked:
            one.wait()
    assert [one.finish for one in asked] == ["error"] * 3
    with pytest.raises(Full):
        engine.submit(asked[0].request)


def test_shares_by_position_average_to_those_of_the_report(model):
    tokens_T = np.arange(24) % 29
    shares_LN = measure(model, tokens_T[None]).shares
    np.testing.assert_allclose(sink_shares_by_position(model, tokens_T).mean(0), shares_LN.mean(1), rtol=1e-5)
