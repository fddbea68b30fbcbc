"""Multiple choice: the forms of rows, log-probabilities against one sequence at a time, scores, the command."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_line, finished_run

import main
import run_lib
from training import tasks
from training.tasks import Question, read_question, scores, wilson

PAINTS = {"activity_label": "Art", "ctx_a": "My aunt paints.", "ctx_b": "the lamp", "ctx": "no"}
WHY = [{"text": "it", "label": "1"}, {"text": "so", "label": "2"}]
FORMS = [
    (
        {"ctx": "A heron finds", "endings": ["it [x]now.", "two  eels"], "label": "1"},
        Question("A heron finds", ["it now.", "two eels"], 1),
    ),
    (PAINTS | {"endings": ["a"], "label": 0}, Question("Art: My aunt paints. The lamp", ["a"], 0)),
    (
        {"question": "Why?", "choices": {"text": ["it", "a lamp", "so"], "label": ["A", "B", "C"]}, "answerKey": "B"},
        Question("Question: Why?\nAnswer:", ["it", "a lamp", "so"], 1),
    ),
    (
        {"question": {"stem": "Why?", "choices": WHY}, "answerKey": "2"},
        Question("Question: Why?\nAnswer:", ["it", "so"], 1),
    ),
    (
        {"goal": "To paint", "sol1": "a lamp", "sol2": "it", "label": 0},
        Question("Question: To paint\nAnswer:", ["a lamp", "it"], 0),
    ),
    (
        {"context": "My aunt ", "choices": ["finds", "forgets"], "answer": 1},
        Question("My aunt ", ["finds", "forgets"], 1),
    ),
]


@pytest.mark.parametrize("row, question", FORMS)
def test_each_form_is_read(row, question):
    assert read_question(row) == question


@pytest.mark.parametrize(
    "row, said",
    [
        ({"text": "A heron"}, "has not the keys"),
        (["A heron"], "has not the keys"),
        ({"context": "A", "choices": ["a", ""], "answer": 0}, "a choice that is no text"),
        ({"context": "A", "choices": ["a", 2], "answer": 0}, "a choice that is no text"),
        ({"context": "A", "choices": [], "answer": 0}, "a choice that is no text, or none"),
        ({"context": "A", "choices": ["a", "b"], "answer": 2}, "none of its 2 choices"),
        ({"context": "A", "choices": ["a", "b"], "answer": True}, "none of its 2 choices"),
        ({"ctx": ["A"], "endings": ["a", "b"], "label": 1}, "context is no text"),
        ({"ctx": "A", "endings": ["a", "b"], "label": ""}, "none of its 2 choices"),  # as of a test split
        ({"question": "A", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"}, "none of its 1 choices"),
        ({"question": {"stem": "A", "choices": ["a"]}, "answerKey": "E"}, "a choice that is no text"),
    ],
)
def test_a_row_that_cannot_be_asked_says_why(row, said):
    with pytest.raises(ValueError, match=said):
        read_question(row)


def direct(model, tokenizer, context: str, choice: str) -> float:
    """One sequence alone, its softmax in float64."""
    ids, before = tokenizer.encode(f"{context} {choice}"), len(tokenizer.encode(context.rstrip()))
    window = ids[-model.config.context_len - 1 :].astype(np.int32)
    logits_TV = np.asarray(model(window[None, :-1])[0], np.float64)
    first = max(0, before - (len(ids) - len(window)) - 1)
    asked = range(first, len(window) - 1)
    return sum(logits_TV[t, window[t + 1]] - np.logaddexp.reduce(logits_TV[t]) for t in asked)


def test_the_log_probability_of_a_choice_is_that_of_its_tokens_alone():
    """Of many lengths: padded, several in a batch, in several batches, and longer than the context of 16."""
    model, tokenizer, *_ = run_lib.load_model(finished_run().workdir)
    contexts = ["A", "My aunt", "My aunt  ", "The miller paints it at 1", "A heron finds two eels at 13.\nThe miller "]
    choices = ["it", "a lamp at 7.", "two eels at 11. My aunt forgets"]
    questions = [Question(context, choices, 0) for context in contexts]
    requests = [pair for question in questions for pair in tasks.encode(question, tokenizer, tokenizer.encode)]
    told: list[int] = []
    found = tasks.log_likelihoods(model, requests, told.append)
    wanted = [direct(model, tokenizer, context, choice) for context in contexts for choice in choices]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
    assert told[-1] == len(requests) == 15


def test_scores_divide_by_nothing_characters_or_bytes():
    """Each of the three takes another choice for the answer."""
    question, log_probs = Question("", ["a", "bbbb", "ééé"], 0), np.array([-2.0, -4.4, -4.2])
    of = [scores([question._replace(answer=answer)], log_probs) for answer in range(3)]
    assert [[told[name] for told in of] for name in ("acc", "acc_norm", "acc_bytes")] == [
        [1, 0, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]
    told = scores([question._replace(answer=answer) for answer in range(3)], np.tile(log_probs, 3))
    assert (told["acc"], told["acc_norm"], told["acc_bytes"], told["questions"]) == (1 / 3, 1 / 3, 1 / 3, 3)
    assert told["acc_norm_95"] == wilson(1, 3)


def test_wilson_s_interval():
    assert wilson(8, 10) == pytest.approx([0.4901625, 0.9433178], abs=1e-6)  # the value of textbooks
    assert wilson(0, 5)[0] == 0 and wilson(5, 5)[1] == 1 and wilson(0, 5)[1] == pytest.approx(0.4344825, abs=1e-6)


def write(path: Path, *rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_eval_scores_each_file(tmp_path, capsys):
    one = write(tmp_path / "herons.jsonl", {"context": "A heron", "choices": ["finds", "T4T4T"], "answer": 0}, "\n")
    aunts = [{"context": "My aunt", "choices": ["TT4T", "finds"], "answer": n} for n in (0, 1)]
    two = write(tmp_path / "two.jsonl", *aunts)
    command = ["eval", f"--workdir={finished_run().workdir}", f"--tasks={one}", f"--tasks={two}"]
    assert main.main(command) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert (first["task"], first["questions"], first["acc"], first["step"]) == ("herons", 1, 1.0, 30)
    assert (second["task"], second["questions"], second["acc"], second["acc_norm"]) == ("two", 2, 0.5, 0.5)
    assert second["acc_95"] == wilson(1, 2)


@pytest.mark.parametrize(
    "lines, words",
    [
        (["\n", "{'context': 1}\n"], ["line 2"]),
        ([{"context": "A", "choices": ["a"], "answer": 5}], ["line 1", "none of its 1 choices"]),
        ([{"context": "Ω", "choices": ["a"], "answer": 0}], ["line 1", "Ω", "--unknown_characters"]),
        ([{"context": "", "choices": ["a"], "answer": 0}], ["line 1", "end-of-text"]),
        (["\n"], ["has no question"]),
        (b"\xff\n", ["cannot be read"]),
    ],
)
def test_a_file_that_cannot_be_asked_is_one_line(lines, words, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(lines) if isinstance(lines, bytes) else write(path, *lines)
    finished_run()
    capsys.readouterr()
    assert main.main(["eval", f"--workdir={finished_run().workdir}", f"--tasks={path}"]) == 2
    assert_one_line(capsys.readouterr().err, f"--tasks={path}", *words)


def test_unknown_characters_can_be_replaced_or_dropped(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", {"context": "AΩ", "choices": ["finds", "Ω"], "answer": 0})
    command = ["eval", f"--workdir={finished_run().workdir}", f"--tasks={path}"]
    for how in ("replace", "drop"):
        assert main.main([*command, f"--unknown_characters={how}"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["questions"] == 1
    path.write_text(path.read_text() + "{}\n")
    assert main.main([*command, "--skip_bad_rows", "--unknown_characters=drop"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["questions"], told["skipped"]) == (1, 1)
    assert main.main([*command, "--split=val"]) == 2
    assert_one_line(capsys.readouterr().err, "--split", "--tasks")
