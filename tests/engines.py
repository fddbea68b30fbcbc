"""A small model in the decode loop of `serving`, and requests to it, for the tests."""

import threading

import numpy as np

from serving.engine import Engine, Request
from transformer.config import TransformerConfig
from transformer.model import Transformer
from transformer.sampling import Sampling, generate_tokens

CONFIG = TransformerConfig(
    **{"vocab_size": 29, "context_len": 40, "num_blocks": 2, "num_heads": 3, "head_dim": 4, "embedding_dim": 12},
    **{"mlp_dim": 14, "tie_embeddings": False},
)


def small_engine(model: Transformer) -> Engine:
    return Engine(model, unsampled=[5], rows=3, queue=220)


class Asked:
    """A request, and what came of it."""

    def __init__(self, prompt, max_tokens, sampling, **settings):
        self.tokens, self.finish, self.ended = [], None, threading.Event()
        self.request = Request(list(map(int, prompt)), max_tokens, sampling, self.take, **settings)

    def take(self, tokens, finish):
        self.tokens += tokens
        self.finish = self.finish or finish
        if finish:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return [token.id for token in self.tokens]


def alone(model, prompt, count, how):
    """The tokens that `sample` writes."""
    return np.concatenate(list(generate_tokens(model, [prompt], count, how, (), [5])))[:, 0].tolist()


def hold(engine):
    """Keeps the engine's thread in the delivery of a token, until the event that this returns is set."""
    reached, held = threading.Event(), threading.Event()
    engine.submit(Request([1], 1, Sampling(0), lambda *_: reached.set() or held.wait()))
    assert reached.wait(60)
    return held
