"""Conversations: their form, their rows, what of them is learned, and a model that answers."""

import dataclasses
import gzip
import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCRATCH, make_text, tiny_config

import main
import run_lib
import train_lib
from commands.sample import Conversation
from configs import chat
from corpus.chat import (
    TEMPLATE,
    ConversationSplit,
    chat_tokens,
    conversation_tokens,
    load_conversations,
    messages_of,
    pack,
)
from corpus.dataset import Wanted
from corpus.formats import Bad
from corpus.tokenizer import ByteTokenizer, tokenizer_from_dict
from corpus.train_tokenizer import train_tokenizer
from interop.tokenizer_json import from_tokenizers, hf_tokenizer_config, to_tokenizers
from runtime.errors import UserError
from runtime.files import write_json
from training.answers import targets_of
from training.evaluate import Evaluator, bits_per_byte
from training.loss import batch_loss, loss_sum
from transformer.config import TransformerConfig
from transformer.model import model_of, params_of
from transformer.sampling import Sampling, generate
from transformer.sharding import make_mesh

WORDS = ["heron", "lamp", "miller", "eels", "aunt", "river", "clock", "moss", "kettle", "stone"]
TALKS = [
    [
        {"role": "user", "content": f"What about the {word}?"},
        {"role": "assistant", "content": f"The {word} is {other}, number {n}."},
        {"role": "user", "content": "Again?"},
        {"role": "assistant", "content": f"{other}!"},
    ]
    for n, (word, other) in enumerate(zip(WORDS, WORDS[3:] + WORDS[:3], strict=True))
]
HARD = [
    {"role": "system", "content": "  Be <|end|> brief.\n"},
    {"role": "user", "content": "naïve ☃ <|assistant|>?"},
    {"role": "assistant", "content": ""},
    {"role": "assistant", "content": " It is 😀\n\n"},
    {"role": "user", "content": "{{ no }} 'quotes' \"too\""},
]
T = 112


@cache
def own():
    text = [make_text(50), *(message["content"] for talk in TALKS for message in talk)]
    return train_tokenizer(iter(text), 300, "gpt4")


def write_rows(path, rows):
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def load(path, tmp_path, tokenizer="", **changes):
    said = []
    settings = {"data_dir": tmp_path / "data", "val_fraction": 0.2, "test_fraction": 0.0, "context_len": T}
    settings |= {"vocabulary": own(), "text_column": "messages", "say": said.append, **changes}
    return load_conversations(Wanted(path, tokenizer, **settings)), said


def explicit_mask(tokens, tokenizer):
    """Which tokens are the assistant's, its turns' ends included: read one by one."""
    start, end = tokenizer.answer
    mask, inside = [], False
    for token in tokens:
        inside = inside and token != tokenizer.eot
        mask.append(inside)
        inside = (inside or token == start) and token != end
    return np.array(mask)


# --- The form ---------------------------------------------------------------------------------------------------------


def test_a_conversation_is_its_turns_and_text_cannot_spell_them():
    tokenizer, (start, end) = own(), own().answer
    ids = conversation_tokens(tokenizer, HARD).tolist()
    role = lambda name: tokenizer.special[f"<|{name}|>"]
    assert [i for i in ids if i in tokenizer.special.values()] == [
        *(tokenizer.eot, role("system"), end, role("user"), end, start, end, start, end, role("user"), end)
    ]
    assert tokenizer.decode([i for i in ids if i < tokenizer.eot]) == "".join(m["content"] for m in HARD)
    assert chat_tokens(tokenizer, HARD).tolist() == [*ids, start]
    with pytest.raises(ValueError, match="role must be one of system, user, assistant, got 'tool'"):
        chat_tokens(tokenizer, [{"role": "tool", "content": ""}])


@pytest.mark.parametrize("talk", [HARD, *TALKS[:2]])
def test_the_exported_template_gives_the_same_ids_and_marks(talk, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tokenizer.json").write_text(to_tokenizers(own()).to_str(), encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", hf_tokenizer_config(own(), chat=True))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    talk = [m | {"content": m["content"].replace("<|", "< |")} for m in talk]  # there, text can spell them
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    found = theirs.apply_chat_template(talk, **how)
    ids = conversation_tokens(own(), talk)
    assert found["input_ids"] == ids.tolist()
    assert found["assistant_masks"] == explicit_mask(ids, own()).astype(int).tolist()
    prompt = theirs.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prompt == chat_tokens(own(), talk).tolist()
    with pytest.raises(Exception, match="a role must be one of system, user, assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": ""}])


def test_a_tokenizer_without_the_tokens_is_refused_and_imported_ones_may_have_them():
    with pytest.raises(UserError, match=r"^config\.chat: tokenizer byte has no tokens .* `main\.py tokenizer` made$"):
        chat_tokens(ByteTokenizer(), TALKS[0])
    content, size = to_tokenizers(own()).to_str(), own().vocab_size
    imported = from_tokenizers(content, size, own().eot, (own().answer[1],))
    assert chat_tokens(imported, HARD).tolist() == chat_tokens(own(), HARD).tolist()
    with pytest.raises(UserError, match=r"^config\.chat: tokenizer imported"):  # its texts would not end with a turn
        chat_tokens(from_tokenizers(content, size, own().eot), HARD)


# --- Rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, found",
    [
        ("", []),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], ["user", "assistant"]),
        ([{"role": "assistant", "content": "b", "weight": 1}], ["assistant"]),
        ([{"role": "user", "content": "a"}], Bad("has no message of the assistant")),
        ([{"role": "tool", "content": "a"}], Bad("has a message of 'tool', which is none of system, user, assistant")),
        ([{"role": "user", "content": None}], Bad('has a message that is no object with a "role" and a "content"')),
        (["hello"], Bad('has a message that is no object with a "role" and a "content"')),
        ("hello", Bad("is no list of messages but str")),
        (None, Bad("is null")),
        ([], Bad("has no message of the assistant")),
        (Bad("other"), Bad("other")),
    ],
)
def test_what_a_row_may_be(value, found):
    got = messages_of(value)
    assert got.startswith(found) if isinstance(found, Bad) else [message["role"] for message in got] == found
    assert isinstance(got, Bad) == isinstance(found, Bad)


def test_rows_hold_whole_conversations_and_long_ones_are_cut():
    start, eot = 9, 0
    talk = lambda n, size: np.array([eot, 100 + n, start, *[n] * (size - 3)])
    late = np.array([eot, *[7] * 10, start, 7])  # no answer begins in a row of it
    talks = [talk(1, 6), talk(2, 7), talk(3, 4), talk(4, 13), late, talk(5, 3)]
    packed, told = pack(talks, 10, start, eot)
    rows = packed[:-1].reshape(-1, 10).tolist()
    assert rows == [[*talks[0], *talks[2]], [*talks[1], *talks[5]], talks[3][:10].tolist()] and packed[-1] == eot
    assert told == (
        "6 conversations in 3 rows of 10 tokens, 100% full; "
        "2 longer than that are cut, and 1 left out, in which no answer begins before"
    )
    assert pack([talk(1, 6)] * 200, 10, start, eot)[1] == "200 conversations in 200 rows of 10 tokens, 60% full"


def test_splits_are_whole_rows_and_every_answer_is_there_once(tmp_path):
    path = write_rows(tmp_path / "talks.jsonl.gz", [{"messages": talk} for talk in TALKS])
    data, said = load(path, tmp_path)
    assert said[0].startswith("training: 8 conversations in ") and said[1].startswith("validation: 2 conversations in ")
    seen = []
    for split, talks in (data.train, TALKS[:8]), (data.val, TALKS[8:]):
        tokens = np.asarray(split.tokens)
        assert len(tokens) % T == 1 and (tokens[::T] == own().eot).all() and split.num_windows(T) == len(tokens) // T
        words = [m["content"] for talk in talks for m in talk if m["role"] == "assistant"]
        answers = tokens[1:][split.in_answers()]
        assert sorted(own().decode(answers).split("<|end|>")) == ["", *sorted(words)]
        assert split.bytes_of(len(answers), own()) == len("".join(words).encode())
        seen += answers.tolist()
    again, said = load(path, tmp_path)
    assert said == [] and (again.train.tokens == data.train.tokens).all() and again.sha256 == data.sha256
    whole, _ = load(path, tmp_path, whole=True)
    assert sorted(whole.train.tokens[1:][whole.train.in_answers()]) == sorted(seen)


def test_parquet_and_sharegpt_give_the_same_rows(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pa.parquet = pytest.importorskip("pyarrow.parquet")
    pa.parquet.write_table(pa.table({"messages": TALKS}), tmp_path / "a.parquet")
    renamed = {"user": "human", "assistant": "gpt"}
    theirs = [[{"from": renamed[m["role"]], "value": m["content"]} for m in talk] for talk in TALKS]
    path = write_rows(tmp_path / "b.jsonl", [{"conversations": talk} for talk in theirs])
    one, _ = load(str(tmp_path / "a.parquet"), tmp_path)
    two, _ = load(path, tmp_path, text_column="conversations")
    assert (one.train.tokens == two.train.tokens).all() and (one.val.tokens == two.val.tokens).all()


@pytest.mark.parametrize(
    "rows, changes, words",
    [
        ([{"messages": talk} for talk in TALKS] + [{"text": "a"}], {}, "row 11: has no 'messages' but text"),
        ([{"messages": TALKS[0]}], {}, "has no conversation in the training split"),
        ([{"messages": talk} for talk in TALKS], {"context_len": 3}, "no conversation .* config.context_len=3"),
    ],
)
def test_what_cannot_be_used_is_one_line(rows, changes, words, tmp_path):
    path = write_rows(tmp_path / "talks.jsonl", rows)
    with pytest.raises(UserError, match=rf"^config\.dataset: [^\n]*{words}[^\n]*$"):
        load(path, tmp_path, **changes)


def test_a_tokenizer_of_ones_own_needs_no_run_to_begin_from(tmp_path):
    path = write_rows(tmp_path / "talks.jsonl", [{"messages": talk} for talk in TALKS])
    write_json(tmp_path / "tokenizer.json", own().to_dict())
    found, _ = load(path, tmp_path, str(tmp_path), vocabulary=None, data_dir=tmp_path / "another")
    np.testing.assert_array_equal(found.train.tokens, load(path, tmp_path)[0].train.tokens)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    rows = [{"messages": talk} for talk in TALKS] + [{"messages": None}]
    data, said = load(write_rows(tmp_path / "a.jsonl", rows), tmp_path, skip_bad_rows=True)
    assert [line for line in said if "row 11: is null" in line and "1 bad rows" in line] and data.val.num_tokens > 1
    (tmp_path / "a.txt").write_text("a text")
    with pytest.raises(UserError, match=r"a\.txt has no rows; give conversations"):
        load(str(tmp_path / "a.txt"), tmp_path)


# --- What is learned --------------------------------------------------------------------------------------------------


def small(**changes):
    start, end = own().answer
    ids = {"document_start": own().eot, "answer_start": start, "answer_end": end}
    return TransformerConfig(own().vocab_size, T, 1, 2, 1, 24, 0, 40, **ids, **changes)


def rows_of_talks():
    """[3, T + 1]: several conversations; one that is cut in an answer; and nothing."""
    packed, _ = pack((conversation_tokens(own(), talk) for talk in TALKS[:2]), T, own().answer[0], own().eot)
    long = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "mill " * T}]
    cut = conversation_tokens(own(), long)[:T]
    return np.stack([packed[: T + 1], [*cut, own().eot], np.full(T + 1, -1)]).astype(np.int32)


def test_the_mask_is_the_one_read_token_by_token():
    batch = rows_of_talks()
    expected = np.stack([explicit_mask(row, own())[1:] for row in batch[:2]])
    targets = np.asarray(targets_of(small(), batch))
    assert (targets[:2] == np.where(expected, batch[:2, 1:], -1)).all() and (targets[2] == -1).all()
    assert 0 < expected[0].sum() < T and expected[1, -2] and not expected[1, -1]  # what fills up is no answer
    split = ConversationSplit(np.append(batch[:2, :-1].ravel(), own().eot), None, (), T, own().answer)
    assert (split.in_answers() == expected.ravel()).all()
    assert (targets_of(dataclasses.replace(small(), answer_start=-1), batch) == batch[:, 1:]).all()


@pytest.mark.parametrize("chunk", [0, 7])
def test_the_gradient_is_that_of_the_answers_alone(random_params, chunk):
    config, batch = small(loss_chunk=chunk, attention_kernel="plain"), rows_of_talks()[:2]
    params = random_params(config)
    mask = np.stack([explicit_mask(row, own())[1:] for row in batch])

    def explicit(params):
        logits = model_of(config, params)(batch[:, :-1])
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), batch[:, 1:, None], -1)[..., 0]
        return -jnp.sum(jnp.where(mask, log_probs, 0.0))

    (loss, count), grads = jax.value_and_grad(lambda p: batch_loss(config, p, batch, None), has_aux=True)(params)
    want, wanted = jax.value_and_grad(explicit)(params)
    assert count == mask.sum() and loss == pytest.approx(float(want), rel=1e-6)
    for name in params:
        np.testing.assert_allclose(grads[name], wanted[name], rtol=2e-4, atol=2e-5, err_msg=name)


def test_what_is_no_answer_has_no_gradient():
    config, batch = small(), rows_of_talks()[:2]
    logits = jax.random.normal(jax.random.key(0), (2, T, config.vocab_size))
    grads = jax.grad(lambda logits: loss_sum(logits, targets_of(config, batch))[0])(logits)
    mask = np.stack([explicit_mask(row, own())[1:] for row in batch])
    assert ((np.abs(grads).max(-1) > 0) == mask).all()


# --- A run ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned():
    """A run that has learned TALKS by heart, from the weights of one that had read a text."""
    folder = SCRATCH / "chat"
    folder.mkdir()
    (folder / "own").mkdir()
    write_json(folder / "own" / "tokenizer.json", own().to_dict())
    shape = {"context_len": 64, "embedding_dim": 64, "mlp_dim": 128, "position": "rope", "norm": "rmsnorm"}
    shape |= {"mlp": "swiglu", "mlp_bias": False, "attention_sink": False}  # as Llama has it
    train_lib.train(tiny_config(tokenizer=str(folder / "own"), max_steps=2, use_muon=False, **shape), folder / "text")
    path = write_rows(folder / "talks.jsonl", [{"messages": talk} for talk in TALKS] * 2)
    config = chat.get_config(str(folder / "text"))
    usual = tiny_config()
    config.update({key: usual[key] for key in ("data_dir", "cpu_devices", "report", "sample_tokens")})
    settings = {
        "dataset": path,
        "val_fraction": 0.5,
        "epochs": 0,
        "max_steps": 150,
        "eval_every": 150,
    }  # at the run's own rate
    config.update({**settings, "save_every": 150, "sample_prompt": TALKS[0][0]["content"] + "\n"})
    return train_lib.train(config, folder / "chat")


def test_a_model_answers_what_it_learned_by_heart(learned):
    ask = lambda talk, turns: generate(
        learned.model, learned.tokenizer, [chat_tokens(learned.tokenizer, talk[:turns])], 40, Sampling(0)
    )[0]
    for talk in TALKS:
        assert (ask(talk, 1), ask(talk, 3)) == (talk[1]["content"], talk[3]["content"])
    assert learned.val_loss < 0.05 and learned.tokenizer.answer[1] not in learned.tokenizer.unsampled
    assert run_lib.read_samples(learned.workdir)[-1][1].startswith("What about the heron?\n")


def test_bits_per_byte_are_of_the_answers(learned):
    config = run_lib.read_config(learned.workdir)
    val = run_lib.load_data(config, print, learned.tokenizer).val
    evaluate = Evaluator(learned.model.config, make_mesh(devices=jax.devices()[:1]), 4)
    loss, tokens = evaluate(params_of(learned.model), val)
    answers = [m["content"] for talk in TALKS for m in talk if m["role"] == "assistant"]
    assert tokens == sum(len(learned.tokenizer.encode(text)) + 1 for text in answers) == val.in_answers().sum()
    bits = loss * tokens / np.log(2) / len("".join(answers).encode())
    assert bits_per_byte(loss, tokens, val, learned.tokenizer) == pytest.approx(bits)
    assert learned.history[-1]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_sample_answers_and_remembers(learned, capsys):
    first, second, third, fourth = (message["content"] for message in TALKS[4])
    assert main.main(["sample", f"--workdir={learned.workdir}", f"--prompt={first}", "--temperature=0"]) == 0
    assert capsys.readouterr().out == second + "\n"
    said, written = [], []
    person = Conversation(learned.model, learned.tokenizer, Sampling(0), 20, said.append, written.append)

    def types(line):
        written.clear()
        assert person.answer(line)
        return "".join(written)

    assert types(first) == second + "\n" and types(third) == fourth + "\n"
    assert [m["content"] for m in person._said] == [first, second, third, fourth]
    assert types("/new") == "" == types("") and person._said == ()
    assert types("/system Be brief.") == "" and types(first)
    assert [m["role"] for m in person._said] == ["system", "user", "assistant"]
    for _ in range(4):  # the oldest turns go, the system's stays
        types(third)
        assert len(chat_tokens(learned.tokenizer, person._said[:-1])) <= 64 - 20
        assert [m["role"] for m in person._said][:2] == ["system", "user"]
    assert said == [] and types("/help") == "" and "/new" in said[0] and "/temperature" in said[0]
    assert max(map(len, Conversation.HELP.split("\n"))) <= 108
    types("word " * 80)
    assert said[-1].startswith("that makes ") and said[-1].endswith("the model reads the last 64")
    assert not person.answer("/quit")


def test_the_export_has_the_template_and_ends_with_a_turn(learned, tmp_path):
    assert main.main(["export", f"--workdir={learned.workdir}", f"--out={tmp_path / 'out'}", "--format=hf"]) == 0
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert read("tokenizer_config.json")["chat_template"] == TEMPLATE
    assert read("config.json")["eos_token_id"] == [learned.tokenizer.eot, learned.tokenizer.answer[1]]
    assert "chat_template" not in hf_tokenizer_config(tokenizer_from_dict(own().to_dict()))


def test_a_config_that_mixes_conversations_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"^config\.chat: .* mask_documents"):
        train_lib.train(tiny_config(chat=True), tmp_path / "run")
    with pytest.raises(UserError, match=r"^config\.chat: tokenizer byte has no tokens"):
        train_lib.train(tiny_config(chat=True, mask_documents=True, tokenizer="byte"), tmp_path / "run")
    with pytest.raises(UserError, match=r"write configs/chat\.py:RUN"):
        chat.get_config()
