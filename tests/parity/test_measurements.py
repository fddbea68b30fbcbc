"""`main.py sinks --from`: what it measures of a saved model is what transformers itself says of its attention."""

import json

import numpy as np
import pytest
import torch
from stock import CONTEXT, STOCK, stock
from travel import CHAR, call, refuse, save, text_file

pytestmark = pytest.mark.usefixtures("encoded_texts_lie_in_scratch")


@pytest.mark.parametrize("architecture", STOCK)
def test_a_saved_model_is_measured_as_it_is(architecture, tmp_path, capsys):
    model, text, out = stock(architecture, {}), text_file(), tmp_path / "measured.json"
    saved = save(tmp_path / "saved", model)
    printed = call(capsys, "sinks", f"--from={saved}", f"--dataset={text}", f"--out={out}")
    found = json.loads(out.read_text())
    windows = 1024 // CONTEXT
    tokens_BT = CHAR.encode(text.read_text())[: windows * CONTEXT].reshape(windows, CONTEXT).astype(np.int64)
    with torch.no_grad():
        said = model(torch.from_numpy(tokens_BT), output_attentions=True, output_hidden_states=True)
    probs_LBNTS = np.array([probs.numpy() for probs in said.attentions], np.float64)
    near = lambda have, want: np.testing.assert_allclose(have, want, rtol=1e-4, atol=1e-6)
    near(found["shares"], 1 - probs_LBNTS.sum(-1).mean((1, 3)))
    near(found["first"], probs_LBNTS[..., 0].mean((1, 3)))
    newline, ends = CHAR.encode("\n")[0], model.config.eos_token_id  # the vocabulary has no space and no full stop
    separates_BT = np.isin(tokens_BT, [newline, -1 if ends is None else ends]) & (np.arange(CONTEXT) > 0)
    near(found["separators"], (probs_LBNTS * separates_BT[:, None, None]).sum(-1).mean((1, 3)))
    near(found["sink_rate"], (probs_LBNTS[..., 0].mean((1, 3)) > 0.3).mean())
    for layer, hidden_BTD in enumerate(said.hidden_states[1:-1]):  # the last is normalised
        x_BTD = hidden_BTD.numpy().astype(np.float64)
        near(found["largest"][layer], np.abs(x_BTD).max())
        near(found["kurtosis"][layer], ((x_BTD - x_BTD.mean()) ** 4).mean() / x_BTD.var() ** 2)
    assert found["tokens"] == tokens_BT.size and found["context_len"] == CONTEXT
    assert printed.rstrip().endswith(" ".join(found["seen"])) and printed.count(", channel ") == len(said.attentions)


def test_a_directory_without_a_model_is_one_line(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    for argv, words in (
        ([f"--from={tmp_path / 'none'}"], "none"),
        ([f"--from={tmp_path}"], "model"),
        ([f"--from={tmp_path}", "--step=3"], "--step"),
        ([f"--workdir={tmp_path}", "--tokenizer=char"], "--tokenizer"),
    ):
        refuse(capsys, ["sinks", *argv], words)
