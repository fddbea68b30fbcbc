"""OpenAI's endpoints as its own client sees them, and the page."""

import asyncio
import contextlib
import json
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from engines import Asked, alone, hold
from helpers import assert_one_line, finished_run
from test_report import CHROMIUM

import main
from corpus.tokenizer import ByteTokenizer, CharTokenizer
from reports.sinks import sink_shares_by_position
from serving.engine import Token
from transformer.sampling import Sampling, generate

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
api = pytest.importorskip("serving.api")
from starlette.responses import HTMLResponse, Response  # noqa: E402
from starlette.routing import Route  # noqa: E402

LETTERS = CharTokenizer(" abcdefghijklmnopqrstuvwxyz.\n")


# --- Text out of tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_no_half_character_leaves_and_tokens_go_with_their_text(size):
    written = "naïve €uros 😀, then STOPped".encode()
    tokens = [Token(byte, -0.5, []) for byte in written]
    for stops, want in (
        [["STOP"], "naïve €uros 😀, then "],
        [["nowhere", "pedal"], written.decode()],
        [["€uros"], "naïve "],
    ):
        text, parts = api.Text(ByteTokenizer(), stops, 0), []
        for start in range(0, len(tokens), size):
            end = "length" if start + size >= len(tokens) else None
            parts.append(text.feed(tokens[start : start + size], end))
            if parts[-1].finish:
                break
        assert "".join(part.text for part in parts) == want and "\ufffd" not in want
        out = [entry for part in parts for entry in part.tokens]
        assert bytes(token.id for _, token in out).decode() == want
        assert [place for place, _ in out] == [len(written[:i].decode(errors="ignore")) for i in range(len(out))]
        shown = 0
        for part in parts:
            shown += len(part.text)
            assert all(place <= shown for place, _ in part.tokens)
        assert parts[-1].finish == ("stop" if want != written.decode() else "length")


def test_a_character_that_is_never_completed_is_told_at_the_end():
    text = api.Text(ByteTokenizer(), [], 0)
    assert text.feed([Token(0xE2, -1.0, [])], None).text == ""
    assert text.feed([], "length").text == "\ufffd"


# --- Over HTTP ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(service):
    """The address of a server in a thread of its own."""
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listening:
        server = uvicorn.Server(uvicorn.Config(service.app(), log_config=None, lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(60)


def chat_tokens(messages):
    return LETTERS.encode("".join(f"{message['role']} {message['content']}\n" for message in messages))


@pytest.fixture(scope="module")
def url(engine):
    service = api.Service(engine, LETTERS, "letters", 10**6, chat_tokens=chat_tokens, hosts=["127.0.0.1"])
    with serving(service) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def text_of(model, prompt, count, **settings):
    """What `sample` writes."""
    return LETTERS.decode(alone(model, LETTERS.encode(prompt), count, Sampling(**settings)))


def test_two_hundred_requests_at_once_none_lost_or_mixed(url, engine):
    rng = random.Random(1)
    prompts = sorted({"".join(rng.choices(LETTERS.symbols, k=rng.randrange(1, 30))) for _ in range(260)})[:200]
    counts = [rng.randrange(1, 30) for _ in prompts]
    asked = [Asked(LETTERS.encode(prompt), count, Sampling(0)) for prompt, count in zip(prompts, counts, strict=True)]
    engine.submit(*(one.request for one in asked))
    want = [LETTERS.decode(one.wait()) for one in asked]
    assert len(set(want)) > 100

    async def one(client, prompt, count, stream):
        ask = {"model": "letters", "prompt": prompt, "max_tokens": count, "temperature": 0, "stream": stream}
        answer = await client.completions.create(**ask)
        if not stream:
            return answer.choices[0].text
        return "".join([part.choices[0].text async for part in answer])

    async def all_of_them():
        many = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=120)
        settings = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}
        async with openai.AsyncOpenAI(**settings, http_client=many) as client:
            cases = zip(prompts, counts, strict=True)
            return await asyncio.gather(*(one(client, *case, i % 2 == 0) for i, case in enumerate(cases)))

    assert asyncio.run(all_of_them()) == want


def test_a_completion_in_each_form(client, model):
    settings = {"temperature": 0.9, "top_p": 0.95}
    ask = {"model": "any", "prompt": "the cat", "max_tokens": 20, "seed": 6, "user": "me", **settings}
    want = [text_of(model, "the cat", 20, seed=seed, **settings) for seed in (6, 7)]
    whole = client.completions.create(**ask, n=2, logprobs=2)
    assert [choice.text for choice in whole.choices] == want and whole.model == "letters"
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (7, 40)
    said = whole.choices[0].logprobs
    assert "".join(said.tokens) == want[0] and said.text_offset == list(range(20)) and len(said.top_logprobs[3]) == 2
    assert all(value <= max(best.values()) for value, best in zip(said.token_logprobs, said.top_logprobs, strict=True))
    parts = list(client.completions.create(**ask, n=2, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        mine = [part.choices[0] for part in parts if part.choices and part.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == want[index] and len(mine) > 1
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["length"]
    assert parts[-1].choices == [] and parts[-1].usage.total_tokens == 47
    stop = want[0][8:11]
    cut = client.completions.create(**ask, stop=[stop, "nowhere"], echo=True)
    assert cut.choices[0].text == "the cat" + want[0].partition(stop)[0] and cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens < 20
    ids = LETTERS.encode("the cat").tolist()
    several = client.completions.create(**{**ask, "prompt": [ids, ids, ids]})
    assert [choice.text for choice in several.choices] == [want[0]] * 3
    assert client.models.list().data[0].id == client.models.retrieve("letters").id == "letters"


def test_a_conversation_in_each_form(client, model):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    ask = {"model": "letters", "messages": messages, "max_completion_tokens": 12, "temperature": 0}
    want = text_of(model, "system be\nuser hi\n", 12, temperature=0)
    whole = client.chat.completions.create(**ask, logprobs=True, top_logprobs=7)
    assert whole.choices[0].message.content == want and whole.object == "chat.completion"
    assert [entry.token for entry in whole.choices[0].logprobs.content] == list(want)
    first = whole.choices[0].logprobs.content[0]
    assert first.bytes == [*want[0].encode()]
    assert first.top_logprobs[0].token == first.token and len(first.top_logprobs) == 7
    parts = list(client.chat.completions.create(**ask, stream=True))
    assert "".join(part.choices[0].delta.content for part in parts) == want
    assert {part.choices[0].delta.role for part in parts[1:]} == {None}
    with client.chat.completions.stream(**ask, n=2, stop=want[5]) as together:  # as the client puts it together
        choices = together.get_final_completion().choices
    assert [(one.message.role, one.message.content) for one in choices] == [("assistant", want.split(want[5])[0])] * 2
    assert parts[-1].choices[0].finish_reason == "length" and parts[0].object == "chat.completion.chunk"


def test_a_prompt_as_what_a_user_says(client, url, model):
    """As the page asks for it."""
    assert client.models.retrieve("letters").chat is True
    ask = {"model": "letters", "max_tokens": 12, "temperature": 0}
    said = client.completions.create(**ask, prompt="hi", extra_body={"chat": True}).choices[0].text
    assert said == text_of(model, "user hi\n", 12, temperature=0)
    sinks = lambda **ask: httpx.post(f"{url}/sinks", json={"token_ids": [1, 2], **ask}, timeout=60).json()["shares"]
    assert sinks(prompt="hi", chat=True) == sinks(prompt="user hi\n") != sinks(prompt="hi")


COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TALK = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        (COMPLETIONS, {"prompt": "é"}, "prompt", "'é' at 0"),
        (COMPLETIONS, {"prompt": "a" * 41}, "prompt", "has 41 tokens; the model reads 40"),
        (COMPLETIONS, {"prompt": 3}, "prompt", "should be a valid string"),
        (COMPLETIONS, {"prompt": [29]}, "prompt", "below 29"),
        (COMPLETIONS, {"prompt": ["a", 3]}, "prompt", "should be a valid string"),
        (COMPLETIONS, {"max_tokens": 10**6 + 1}, "max_tokens", "at most 1000000, got 1000001"),
        (COMPLETIONS, {"max_tokens": True}, "max_tokens", "got True"),
        (COMPLETIONS, {"temperature": 2.1}, "temperature", "less than or equal to 2"),
        (COMPLETIONS, {"temperature": float("nan")}, "temperature", "finite number"),
        (COMPLETIONS, {"top_p": "1"}, "top_p", "got '1'"),
        (COMPLETIONS, {"seed": -1}, "seed", "greater than or equal to 0"),
        (COMPLETIONS, {"n": 0}, "n", "greater than or equal to 1"),
        (COMPLETIONS, {"n": 112, "prompt": ["a", "b"]}, "n", "224 texts at once; this server takes at most 223"),
        (COMPLETIONS, {"prompt": ["a"] * 300}, "prompt", "300 texts at once"),
        (COMPLETIONS, {"stop": ["a", ""]}, "stop", "at least 1 character"),
        (COMPLETIONS, {"stop": ["a"] * 5}, "stop", "at most 4 items"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs", "less than or equal to 5"),
        (COMPLETIONS, {"stream": 1}, "stream", "valid boolean"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options", "only with stream"),
        (COMPLETIONS, {"echo": True, "logprobs": 1}, "echo", "not together with logprobs"),
        (COMPLETIONS, {"frequency_penalty": 0.5}, "frequency_penalty", "not permitted"),
        (COMPLETIONS, {"logit_bias": {"3": 1}}, "logit_bias", "not permitted"),
        (COMPLETIONS, {"top_k": 3}, "top_k", "not permitted"),
        (CHAT, {"messages": []}, "messages", "at least 1 item"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "should be 'text'"),
        (CHAT, {"messages": [{"role": "user", "content": "É"}]}, "messages", "not in the vocabulary"),
        (CHAT, {**TALK, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        (CHAT, {**TALK, "tools": [{}]}, "tools", "not permitted"),
        (CHAT, {**TALK, "response_format": {"type": "json_object"}}, "response_format", "not permitted"),
        ("/sinks", {"prompt": "a", "token_ids": []}, "token_ids", "at least 1 item"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(url, path, body, param, words):
    answer = httpx.post(url + path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert words in error["message"]


def test_what_is_no_request_is_refused(url, engine):
    kind = {"Content-Type": "application/json"}
    for status, words, content, headers in (
        (400, "Invalid JSON", b"{", kind),
        (400, "recursion limit", b"[" * 100_000, kind),
        (400, "should be an object", b"[1]", kind),
        (413, "more than", b" " * (2**20 + 1), kind),
        (415, "application/json", b"{}", {"Content-Type": "text/plain"}),
        (403, "answers to 127.0.0.1", b"{}", {**kind, "Host": "elsewhere.example"}),
    ):
        answer = httpx.post(url + COMPLETIONS, content=content, headers=headers)
        assert answer.status_code == status and words in answer.json()["error"]["message"], answer.text
    assert httpx.get(url + "/gone").json()["error"]["message"] == "GET /gone: Not Found"
    assert httpx.get(url + COMPLETIONS).status_code == 405
    assert httpx.get(url + "/v1/models/gone").status_code == 404
    with serving(api.Service(engine, LETTERS, "letters")) as other:
        answer = httpx.post(other + CHAT, json=TALK)
        assert answer.status_code == 400 and "was not trained on conversations" in answer.json()["error"]["message"]


def busy(engine):
    return sum(text is not None for text in engine._texts)


def until_free(engine):
    deadline = time.monotonic() + 60
    while busy(engine) or engine._waiting:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_frees_the_place(url, engine, stream):
    ask = {"prompt": "a", "max_tokens": 10**6, "n": 3, "stream": stream}
    with httpx.Client(timeout=60) as client:
        if stream:
            with client.stream("POST", url + COMPLETIONS, json=ask) as answer:
                lines = answer.iter_lines()  # closes the stream when it is dropped
                next(lines)
                while busy(engine) < 3:
                    time.sleep(0.001)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(url + COMPLETIONS, json=ask, timeout=0.3)
    made = [text.made for text in engine._texts if text]
    until_free(engine)
    assert all(count < 10**6 for count in made)


def test_a_queue_that_is_full_and_a_time_that_is_over(engine, client):
    service = api.Service(engine, LETTERS, "letters", 10**6, seconds=0.5)
    until_free(engine)
    with serving(service) as url:
        slow = httpx.post(url + COMPLETIONS, json={"prompt": "a", "max_tokens": 10**6}, timeout=60).json()
        assert slow["choices"][0]["finish_reason"] == "length" and 0 < slow["usage"]["completion_tokens"] < 10**6
        until_free(engine)
        held = hold(engine)
        try:
            for stream in (False, True):
                late = httpx.post(url + COMPLETIONS, json={"prompt": "a", "stream": stream}, timeout=60)
                assert "no place became free in time" in late.text and late.status_code == (200 if stream else 503)
            engine.submit(*(Asked([1], 1, Sampling(0)).request for _ in range(engine.places)))
            full = httpx.post(url + COMPLETIONS, json={"prompt": "a"}, timeout=60)
            assert full.status_code == 429 and full.headers["Retry-After"] == "1"
            assert full.json()["error"]["code"] == "queue_full"
        finally:
            held.set()
    until_free(engine)


# --- The page -----------------------------------------------------------------------------------------------------


def test_the_page_asks_for_nothing_from_elsewhere(url):
    answer = httpx.get(url)
    assert answer.text.count("http") == 0 and "src=" not in answer.text and "@import" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2 and "unsafe" not in policy


def test_each_tokens_attention_to_the_sinks(url, model):
    new = LETTERS.encode("sat on the mat. the cat sat on the mat").tolist()
    shares = httpx.post(f"{url}/sinks", json={"prompt": "the cat ", "token_ids": new}, timeout=60).json()["shares"]
    text = [*LETTERS.encode("the cat ").tolist(), *new]
    want_TL = np.asarray(sink_shares_by_position(model, np.array(text[-41:-1])))
    assert shares[:5] != [None] * 5 and len(shares) == len(new)
    np.testing.assert_allclose(shares[-33:], want_TL[-33:], atol=1.1e-5)


PROBE = """<!DOCTYPE html><iframe src="/" style="width:{width}px;height:1000px;border:0"></iframe><script>
const until = async (what, holds) => {{
  for (let i = 0; i < 1500; i++) {{ if (holds()) return; await new Promise(done => setTimeout(done, 20)); }}
  throw new Error("never came: " + what);
}};
onload = async () => {{
  const view = document.querySelector("iframe"), page = view.contentDocument, at = id => page.getElementById(id);
  const press = (on, key, more) =>
    on.dispatchEvent(new view.contentWindow.KeyboardEvent("keydown", {{key, bubbles: true, ...more}}));
  const spans = () => [...page.querySelectorAll("#text .new")], found = {{}};
  const set = (id, value) => {{ at(id).value = value; at(id).dispatchEvent(new view.contentWindow.Event("input")); }};
  try {{
    await until("the model's name", () => page.title === "letters");
    set("prompt", "the cat"), set("max_tokens", 30), set("seed", 6);
    found.outputs = [...page.querySelectorAll("output")].map(output => output.value);
    press(at("prompt"), "Enter", {{ctrlKey: true}});
    await until("a text", () => at("status").textContent.includes("a second"));
    [found.text, found.count] = [at("text").textContent, spans().length];
    spans()[0].focus();
    press(page.activeElement, "ArrowRight");
    found.moved = spans().indexOf(page.activeElement);
    found.stops = page.querySelectorAll("#text [tabindex='0']").length;
    await until("the sinks", () => at("about").textContent.includes("layer 2"));
    found.about = at("about").textContent;
    found.label = spans()[1].getAttribute("aria-label");
    found.coloured = new Set(spans().map(span => span.style.background)).size;
    found.wide = page.documentElement.scrollWidth;
    const controls = [...page.querySelectorAll("button, input, textarea")];
    found.small = controls.filter(control => control.getBoundingClientRect().height < 24).length;
    found.unnamed = [...page.querySelectorAll("input, textarea")].filter(e => !e.labels.length).length;
    found.paper = view.contentWindow.getComputedStyle(page.body).backgroundColor;
    set("max_tokens", 1000);
    at("write").click();
    await until("a text to stop", () => spans().length > 3 && !at("stop").disabled);
    press(page.body, "Escape");
    await until("the end", () => at("stop").disabled);
    [found.stopped, found.short] = [at("status").textContent, spans().length < 1000];
    await until("quiet", () => !at("write").disabled);
    set("prompt", "É");
    at("write").click();
    await until("an error", () => at("status").className === "wrong");
    found.error = at("status").textContent;
  }} catch (error) {{
    found.thrown = String(error) + at("status").textContent;
  }}
  await fetch("/found", {{method: "POST", body: JSON.stringify(found)}});
}};
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1200, False)])
def test_the_page_in_a_browser(engine, model, tmp_path, width, dark):
    told = queue.Queue()

    async def take(call):
        told.put(await call.json())
        return Response()

    app = api.Service(engine, LETTERS, "letters", 3000).app()
    probe = lambda call: HTMLResponse(PROBE.format(width=width))
    app.router.routes += [Route("/probe", probe), Route("/found", take, methods=["POST"])]
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    options += [f"--window-size={width + 40},1100", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    with serving(SimpleNamespace(app=lambda: app)) as url, (tmp_path / "console").open("w+") as console:
        browser = subprocess.Popen(
            [CHROMIUM, *options, "--remote-debugging-port=0", f"{url}/probe"], stdout=console, stderr=console
        )
        try:
            found = told.get(timeout=120)
        finally:
            browser.terminate()
            browser.wait(60)
        console.seek(0)
        complaints = [line for line in console if "CONSOLE" in line]
    assert "thrown" not in found, found
    want = text_of(model, "the cat", 30, temperature=0.8, seed=6)
    assert found["text"] == "the cat" + want and found["count"] == 30 and found["outputs"] == ["0.8", "1", "30"]
    assert found["moved"] == 1 and found["stops"] == 1 and found["coloured"] > 3
    assert found["label"].startswith(f"{want[1]}, ") and " has a probability of " in found["about"]
    assert found["wide"] <= width and found["small"] == found["unnamed"] == 0
    assert found["paper"] == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert found["stopped"].endswith("; stopped") and found["short"]
    assert found["error"].startswith("prompt: characters not in the vocabulary: 'É' at 0")
    assert [line for line in complaints if "400 (Bad Request)" not in line] == []


# --- The command --------------------------------------------------------------------------------------------------


def test_the_command_answers_and_a_signal_lets_it_finish(capsys):
    workdir, found = finished_run().workdir, {}

    def visit():
        try:
            while not (said := re.search(r" at (http://\S+) and ", capsys.readouterr().out)):
                time.sleep(0.05)
            url = said[1]
            # long enough for the server, which looks for a signal ten times a second, to close before the text ends
            ask = {"prompt": "A heron", "max_tokens": 2000, "temperature": 0, "stream": True}
            with httpx.stream("POST", url + COMPLETIONS, json=ask, timeout=60) as answer:
                lines = answer.iter_lines()
                found["first"] = next(lines)
                os.kill(os.getpid(), signal.SIGTERM)
                found["rest"] = [line for line in lines if line]
            with contextlib.suppress(httpx.HTTPError):
                found["late"] = httpx.get(url)
        except BaseException as error:
            found["error"] = error
            os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=visit, daemon=True).start()
    assert main.main(["serve", f"--workdir={workdir}", "--port=0", "--max_batch=2"]) == 128 + signal.SIGTERM
    assert "error" not in found, found
    assert found["rest"][-1] == "data: [DONE]" and "late" not in found
    events = [json.loads(line.removeprefix("data: ")) for line in [found["first"], *found["rest"][:-1]]]
    run = finished_run()
    want = generate(run.model, run.tokenizer, ["A heron"], 2000, Sampling(0))[0]
    assert "".join(event["choices"][0]["text"] for event in events) == want and len(want) == 2000


def test_what_cannot_be_served_is_one_line(capsys, monkeypatch, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main.main(["serve", f"--workdir={tmp_path}", f"--port={port}"]) == 2
        assert_one_line(capsys.readouterr().err, f"--port={port}: cannot listen on 127.0.0.1")
    assert main.main(["serve", f"--workdir={tmp_path / 'gone'}", "--port=0"]) == 2
    assert_one_line(capsys.readouterr().err, "no such directory")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main.main(["serve", f"--workdir={tmp_path}"]) == 2
    assert_one_line(capsys.readouterr().err, "serve: ", "pip install -r requirements-serve.txt")
