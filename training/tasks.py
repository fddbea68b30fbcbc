"""Multiple choice by log-likelihood, as lm-evaluation-harness scores it (`multiple_choice` in its lm_eval/api/task.py).

The choice with the highest log-probability after the context is the model's answer; in acc_norm each is divided by the
choice's characters, in acc_bytes by its UTF-8 bytes, the space before it not counted.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from corpus.tokenizer import Tokenizer
from input_pipeline import IGNORED
from training.evaluate import LOGITS, token_log_probs
from transformer.model import Transformer

SHORTEST = 16  # tokens of a row; longer ones have a power of two, or all of the context: so there are few programs
Z = 1.959964  # standard deviations to either side of 95 % of a normal distribution


class Question(NamedTuple):
    """A row of a task: each choice goes on from the context, after a space."""

    context: str
    choices: list[str]
    answer: int


def read_question(row: Any) -> Question:
    """A row of HellaSwag's, ARC's or PIQA's files, or of this form, with lm-eval's prompts; ValueError if of none."""
    match row:
        case {"endings": list(choices), "label": answer, **rest}:
            context = rest.get("ctx", "")
            if "ctx_b" in rest:
                context = f"{rest.get('ctx_a', '')} {str(rest['ctx_b']).capitalize()}"
            context = _of_wikihow(f"{rest['activity_label']}: {context}" if "activity_label" in rest else context)
            choices = [_of_wikihow(choice) for choice in choices]
        case {"question": {"stem": stem, "choices": list(given)}, "answerKey": key}:
            given = [choice if isinstance(choice, dict) else {} for choice in given]
            texts, labels = ([choice.get(name) for choice in given] for name in ("text", "label"))
            return read_question({"question": stem, "choices": {"text": texts, "label": labels}, "answerKey": key})
        case {"question": stem, "choices": {"text": list(choices), "label": list(labels)}, "answerKey": key}:
            context, answer = f"Question: {stem}\nAnswer:", labels.index(key) if key in labels else None
        case {"goal": goal, "sol1": first, "sol2": second, "label": answer}:
            context, choices = f"Question: {goal}\nAnswer:", [first, second]
        case {"context": str(context), "choices": list(choices), "answer": answer}:
            pass
        case _:
            raise ValueError("has not the keys of HellaSwag, ARC or PIQA, nor context, choices and answer")
    if isinstance(answer, str) and answer.isdecimal():
        answer = int(answer)
    if not isinstance(context, str):
        raise ValueError("its context is no text")
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("has a choice that is no text, or none")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"its answer is none of its {len(choices)} choices")
    return Question(context, choices, answer)


def _of_wikihow(text: Any) -> Any:
    """HellaSwag's text without what the pages left in it, as lm-eval's task cleans it; what is no text as it is."""
    if not isinstance(text, str):
        return text
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def encode(question: Question, tokenizer: Tokenizer, encode_text: Callable[[str], np.ndarray]) -> Iterator[tuple]:
    """Of each choice, context and choice as tokens, and how many of these are the choice's; ValueError if all are."""
    context = question.context.rstrip()
    before = encode_text(context) if context else np.array([tokenizer.eot or 0])
    if not context and tokenizer.eot is None:
        raise ValueError("an empty context needs an end-of-text token, which this tokenizer has not")
    for choice in question.choices:
        ids = encode_text(f"{question.context} {choice}")
        whole = ids if context else np.concatenate([before, ids])
        yield whole, len(whole) - len(before)


def log_likelihoods(
    model: Transformer, requests: Sequence[tuple[np.ndarray, int]], done: Callable[[int], None]
) -> np.ndarray:
    """The log-probability, in nats, of the last tokens of each request: (tokens, how many). float64 [requests].

    Of what is too long for the context the end is read. `done` is told how many are.
    """
    score, most = token_log_probs(model), model.config.context_len
    result, finished = np.zeros(len(requests)), 0
    length_of = lambda number: min(most, max(SHORTEST, 1 << (len(requests[number][0]) - 2).bit_length()))
    for length, group in groupby(sorted(range(len(requests)), key=length_of), length_of):
        numbers = list(group)
        rows = max(1, min(LOGITS // (4 * length * model.config.vocab_size), 4096 // length, len(numbers)))
        rows = 1 << (rows.bit_length() - 1)
        for start in range(0, len(numbers), rows):
            some = numbers[start : start + rows]
            batch_BT1 = np.full((rows, length + 1), IGNORED, np.int32)
            for row, number in zip(batch_BT1, some, strict=False):
                ids = requests[number][0][-length - 1 :]
                row[: len(ids)] = ids
            found_BT = np.asarray(score(batch_BT1), np.float64)
            for found_T, number in zip(found_BT, some, strict=False):
                ids, count = requests[number]
                end = min(len(ids) - 1, length)
                result[number] = found_T[max(0, end - count) : end].sum()
            done(finished := finished + len(some))
    return result


def scores(questions: Sequence[Question], log_probs: np.ndarray) -> dict[str, Any]:
    """The share of right answers, and Wilson's 95 % interval of each, from all choices' log-probabilities in order."""
    right = dict.fromkeys(("acc", "acc_norm", "acc_bytes"), 0)
    ends = np.cumsum([len(question.choices) for question in questions])
    for question, own in zip(questions, np.split(log_probs, ends[:-1]), strict=True):
        sizes = [np.ones(len(own)), [len(c) for c in question.choices], [len(c.encode()) for c in question.choices]]
        for name, size in zip(right, sizes, strict=True):
            right[name] += int(np.argmax(own / np.asarray(size)) == question.answer)
    count, told = len(questions), {}
    for name, number in right.items():
        told |= {name: number / count, f"{name}_95": wilson(number, count)}
    return told | {"questions": count}


def wilson(right: int, count: int) -> list[float]:
    """Wilson's score interval of a share (JASA 22, 1927): where the share may lie with a confidence of 95 %."""
    share, spread = right / count, Z * Z / count
    middle, half = share + spread / 2, Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return [max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))]
