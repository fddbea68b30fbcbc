"""The endpoints: OpenAI's completions and chat, and the page. Whatever is asked for is done, or refused in words."""

import asyncio
import base64
import hashlib
import json
import math
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from corpus.tokenizer import Tokenizer, UnknownCharacters, UpTo
from reports.sinks import sink_shares_by_position
from runtime.files import parse_json, read_file
from serving.engine import ALTERNATIVES, Engine, Full, Request, Token
from transformer.sampling import Sampling, power_of_two, prompt_tokens

ChatTokens = Callable[[list[dict[str, str]]], Sequence[int]]

_LARGEST_BODY, _BODY_SECONDS = 2**20, 30
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_USUAL: dict[str, list[Any]] = {  # what is taken only so, as if it were not there
    **{"frequency_penalty": [0], "presence_penalty": [0], "logit_bias": [{}], "best_of": [1], "suffix": [""]},
    **{"tools": [[]], "functions": [[]], "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False]},
    **{"response_format": [{"type": "text"}], "modalities": [["text"]]},
}
_SHARED = {"n", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "logprobs"}
_OWN = {False: {"prompt", "echo", "return_token_ids"}, True: {"messages", "max_completion_tokens", "top_logprobs"}}


class Refusal(Exception):
    """An answer in OpenAI's form of errors."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
        self.status = status

    def response(self) -> JSONResponse:
        wait = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse(self.body, self.status, wait)


@dataclass(frozen=True)
class Limits:
    """What a request may take: new tokens of each text; seconds, after which a text ends."""

    tokens: int = 4096
    seconds: float = 600


@dataclass(frozen=True)
class Ask:
    """A request as it was understood."""

    chat: bool
    prompts: list[tuple[str, list[int]]]  # text, where it is echoed, and ids
    n: int
    max_tokens: int
    samplings: list[Sampling]  # one for each of the n texts
    stops: list[str]
    alternatives: int | None  # None: no log-probabilities
    stream: bool
    usage: bool
    echo: bool
    ids: bool


def _number(body: dict[str, Any], name: str, default: Any, least: float, most: float = math.inf, whole: bool = True):
    value = body.get(name)
    if value is None:
        return default
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most or value == math.inf:
        span = f"at least {least}" if most == math.inf else f"from {least} to {most}"
        raise Refusal(f"{name}: must be a {'whole ' * whole}number {span}, got {json.dumps(value)[:80]}", name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refusal(f"{name}: must be true or false, got {json.dumps(value)[:80]}", name)
    return bool(value)


def _stops(body: dict[str, Any]) -> list[str]:
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
        raise Refusal("stop: must be a text, or a list of up to 4 texts, none of them empty", "stop")
    return stops


class Service:
    """The endpoints of one model.

    Args:
      name: of the model.
      chat_tokens: the ids of a conversation, up to where the assistant's next words begin; None of a model that has
        learned none. Its ValueError is told to who asked.
      hosts: the names under which it may be called; empty for any. On loopback, another name is that of a web page
        which had its address changed to this machine's.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        limits: Limits | None = None,
        chat_tokens: ChatTokens | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self._engine, self._tokenizer, self._limits = engine, tokenizer, limits or Limits()
        self._config, self._chat_tokens, self._hosts = engine.model.config, chat_tokens, hosts
        self._model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "you"}
        self._model |= {"max_model_len": self._config.context_len, "max_tokens": self._limits.tokens}
        self._model |= {"attention_sink": self._config.has_sinks}
        self._page = read_file(Path(__file__).parent / "page.html").decode()
        inline = (re.search(f"<{tag}>(.*?)</{tag}>", self._page, re.DOTALL) for tag in ("script", "style"))
        hashed = (hashlib.sha256(found[1].encode()).digest() for found in inline if found)
        script, style = (base64.b64encode(digest).decode() for digest in hashed)
        policy = f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{script}'"
        self._headers = {
            "Content-Security-Policy": f"{policy}; style-src 'sha256-{style}'; base-uri 'none'; frame-ancestors 'self'",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }

    def app(self) -> Starlette:
        get = {
            "/": self._show,
            "/v1/models": lambda call: JSONResponse({"object": "list", "data": [self._model]}),
            "/v1/models/{name:path}": self._one_model,
        }
        post = {"/v1/completions": self._complete, "/v1/chat/completions": self._chat, "/sinks": self._sinks}
        routes = [Route(path, self._guarded(answer)) for path, answer in get.items()]
        routes += [Route(path, self._guarded(answer), methods=["POST"]) for path, answer in post.items()]
        errors = {
            Refusal: lambda call, refusal: refusal.response(),
            HTTPException: lambda call, e: Refusal(
                f"{call.method} {call.url.path}: {e.detail}", None, e.status_code
            ).response(),
            Exception: lambda call, e: Refusal("an error of the server's own; its log has it", None, 500).response(),
        }
        return Starlette(routes=routes, exception_handlers=errors)

    def _guarded(self, answer: Callable[[Call], Any]) -> Callable[[Call], Any]:
        async def call(call: Call) -> Response:
            if self._hosts and call.url.hostname not in self._hosts:
                raise Refusal(f"Host {call.url.hostname}: this server answers to {', '.join(self._hosts)}", None, 403)
            response = answer(call)
            return response if isinstance(response, Response) else await response

        return call

    def _show(self, call: Call) -> Response:
        return HTMLResponse(self._page, headers=self._headers)

    def _one_model(self, call: Call) -> Response:
        if call.path_params["name"] != self._model["id"]:
            raise Refusal(f"there is no model {call.path_params['name']!r}", "model", 404, "model_not_found")
        return JSONResponse(self._model)

    async def _complete(self, call: Call) -> Response:
        return await self._answer(call, chat=False)

    async def _chat(self, call: Call) -> Response:
        return await self._answer(call, chat=True)

    async def _body(self, call: Call) -> dict[str, Any]:
        if not call.headers.get("content-type", "").startswith(
            "application/json"
        ):  # nor can other sites' pages send it
            raise Refusal("Content-Type: must be application/json", None, 415)
        data = b""
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for part in call.stream():
                    data += part
                    if len(data) > _LARGEST_BODY:
                        raise Refusal(f"the request has more than {_LARGEST_BODY:,} bytes", None, 413)
            body = parse_json(data)
        except TimeoutError:
            raise Refusal(f"the request did not come in {_BODY_SECONDS} s", None, 408) from None
        except ValueError as error:
            raise Refusal(f"the request {error}") from error
        if not isinstance(body, dict):
            raise Refusal("the request must be a JSON object")
        return body

    # --- What is asked for --------------------------------------------------------------------------------------------

    def _understand(self, body: dict[str, Any], chat: bool) -> Ask:
        for name, value in body.items():
            if name in _USUAL and value is not None and value not in _USUAL[name]:
                raise Refusal(f"{name}: is not supported; leave it out", name, code="unsupported_parameter")
            if name not in _SHARED | _OWN[chat] | _HARMLESS | _USUAL.keys():
                raise Refusal(f"{name}: is no parameter of this endpoint", name, code="unknown_parameter")
        if chat and self._chat_tokens is None:
            raise Refusal("this model was not trained on conversations (configs/chat.py)", "messages")
        prompts = [("", self._conversation(body))] if chat else self._prompts(body)
        for _, ids in prompts:
            if len(ids) > (room := self._config.context_len):
                message = f"the prompt has {len(ids)} tokens; the model reads {room}"
                raise Refusal(message, "messages" if chat else "prompt", code="context_length_exceeded")
        n = _number(body, "n", 1, 1, 128)
        most = self._limits.tokens
        long = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
        max_tokens = _number(body, long, most if chat else min(16, most), 1, most)
        temperature = _number(body, "temperature", 1.0, 0, 2, whole=False)
        top_p = _number(body, "top_p", 1.0, 0, 1, whole=False) or 1e-9  # at 0 the likeliest token alone
        seed = _number(body, "seed", secrets.randbelow(2**31), 0, 2**63 - 1)
        alternatives: int | None
        if chat:
            alternatives = _number(body, "top_logprobs", 0, 0, ALTERNATIVES)
            if alternatives and not _flag(body, "logprobs"):
                raise Refusal("top_logprobs: needs logprobs to be true", "top_logprobs")
            alternatives = alternatives if _flag(body, "logprobs") else None
        else:
            alternatives = _number(body, "logprobs", None, 0, 5)
        options = body.get("stream_options") or {}
        if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
            raise Refusal("stream_options: must be an object with include_usage", "stream_options")
        echo, stream = _flag(body, "echo"), _flag(body, "stream")
        if options and not stream:
            raise Refusal("stream_options: only with stream", "stream_options")
        if echo and alternatives is not None:
            raise Refusal("echo: not together with logprobs", "echo", code="unsupported_parameter")
        samplings = [Sampling(temperature, top_p=top_p, seed=(seed + i) % 2**63) for i in range(n)]
        asked = chat, prompts, n, max_tokens, samplings, _stops(body), alternatives, stream
        return Ask(*asked, _flag(options, "include_usage"), echo, _flag(body, "return_token_ids"))

    def _prompts(self, body: dict[str, Any]) -> list[tuple[str, list[int]]]:
        given = body.get("prompt")
        given = "" if given is None else given
        several = isinstance(given, list) and given and not all(_is_id(item) for item in given)
        return [self._ids(prompt) for prompt in (given if several else [given])]

    def _ids(self, prompt: Any) -> tuple[str, list[int]]:
        if isinstance(prompt, list) and prompt and all(_is_id(item) for item in prompt):
            if max(prompt) >= self._config.vocab_size:
                raise Refusal(f"prompt: ids must be below {self._config.vocab_size}", "prompt")
            return b"".join(self._tokenizer.pieces[i] for i in prompt).decode(errors="replace"), prompt
        if not isinstance(prompt, str):
            raise Refusal("prompt: must be a text, a list of ids that is not empty, or a list of such", "prompt")
        try:
            return prompt, prompt_tokens(self._tokenizer, prompt).tolist()
        except UnknownCharacters as error:
            raise Refusal(f"prompt: {error}", "prompt") from error

    def _conversation(self, body: dict[str, Any]) -> list[int]:
        messages = body.get("messages")
        wrong = Refusal("messages: must be a list of objects with a role and a content of text", "messages")
        if not isinstance(messages, list) or not messages:
            raise wrong
        talk = []
        for message in messages:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and all(
                isinstance(part, dict) and part.get("type") == "text" for part in content
            ):
                content = "".join(str(part.get("text", "")) for part in content)
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise wrong
            talk.append({"role": message["role"], "content": content})
        try:
            return list(map(int, self._chat_tokens(talk))) if self._chat_tokens else []
        except ValueError as error:  # UnknownCharacters too
            raise Refusal(f"messages: {error}", "messages") from error

    # --- What is answered ---------------------------------------------------------------------------------------------

    async def _answer(self, call: Call, chat: bool) -> Response:
        ask = self._understand(await self._body(call), chat)
        writing = Writing(self._engine, self._tokenizer, ask, self._limits.seconds)  # refuses before a stream begins
        head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12),
            "object": ("chat.completion" if chat else "text_completion") + ".chunk" * (chat and ask.stream),
            "created": int(time.time()),
            "model": self._model["id"],
        }
        if ask.stream:
            return StreamingResponse(self._events(head, writing), media_type="text/event-stream")
        work = asyncio.ensure_future(self._whole(head, writing))
        gone = asyncio.ensure_future(_gone(call))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=499)
        finally:
            work.cancel()
            gone.cancel()

    async def _events(self, head: dict[str, Any], writing: "Writing") -> AsyncIterator[str]:
        event = lambda value: f"data: {json.dumps(value)}\n\n"
        none = {"usage": None} if writing.ask.usage else {}
        try:
            async with aclosing(writing.parts()) as parts:
                async for index, part in parts:
                    yield event(head | {"choices": [writing.choice(index, part, delta=True)]} | none)
        except Refusal as refusal:
            yield event(refusal.body)
        else:
            if writing.ask.usage:
                yield event(head | {"choices": [], "usage": writing.usage()})
        yield "data: [DONE]\n\n"

    async def _whole(self, head: dict[str, Any], writing: "Writing") -> dict[str, Any]:
        whole: list[Part] = [Part() for _ in writing.texts]
        async with aclosing(writing.parts()) as parts:
            async for index, part in parts:
                whole[index].add(part)
        choices = [writing.choice(index, part, delta=False) for index, part in enumerate(whole)]
        return head | {"choices": choices, "usage": writing.usage()}

    async def _sinks(self, call: Call) -> Response:
        """How much each layer gave to its sinks where it chose each token of a text; null before the context."""
        body = await self._body(call)
        if not self._config.has_sinks:
            raise Refusal("this model has no attention sinks", None, 404)
        (_, prompt), (_, new) = self._ids(body.get("prompt")), self._ids(body.get("token_ids"))
        ids = [*prompt, *new][:-1][-self._config.context_len :]
        tokens_T = np.zeros(min(self._config.context_len, power_of_two(len(ids))), np.int32)
        tokens_T[: len(ids)] = ids
        try:
            wait = self._engine.call(lambda: np.asarray(sink_shares_by_position(self._engine.model, tokens_T)))
        except Full:
            raise Refusal("too many requests wait; try again", None, 429) from None
        shares = np.round(await asyncio.wrap_future(wait), 5)[: len(ids)][-len(new) :].tolist()
        return JSONResponse({"shares": [None] * (len(new) - len(shares)) + shares})


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


async def _gone(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


@dataclass
class Part:
    """A piece of a text, or all of it: characters, tokens with the place where each begins, and why it ended."""

    text: str = ""
    tokens: list[tuple[int, Token]] | None = None
    finish: str | None = None

    def add(self, part: "Part") -> None:
        self.text += part.text
        self.tokens = (self.tokens or []) + (part.tokens or [])
        self.finish = part.finish


class Text:
    """One text as it comes: tokens in, whole characters up to a stop out, each token when all of it is out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: int):
        self._tokenizer, self._decoder, self._cut = tokenizer, tokenizer.text_stream(), UpTo(stops)
        self._came = self._out = start  # characters: decoded, given out
        self._held: list[tuple[int, Token]] = []
        self.count = 0  # of tokens

    def feed(self, tokens: list[Token], finish: str | None) -> Part:
        text = ""
        for token in tokens:
            self.count += 1
            if token.id in self._tokenizer.ends:
                continue
            self._held.append((self._came, token))
            piece = self._decoder.feed([token.id])
            self._came += len(piece)
            text += self._cut.feed(piece)
            if self._cut.ended:
                break
        if self._cut.ended:
            finish = "stop"
        elif finish:
            text += self._cut.feed(self._decoder.flush()) + self._cut.flush()
        self._out += len(text)
        ends = [place for place, _ in self._held[1:]] + [self._came]
        known = lambda place, end: place < self._out and (finish is not None or end <= self._out)
        places = zip([place for place, _ in self._held], ends, strict=True) if self._held else ()
        count = sum(known(*span) or (finish is not None and not self._cut.ended) for span in places)
        out, self._held = self._held[:count], self._held[count:]
        return Part(text, out, finish)


class Writing:
    """The texts of one request, from the engine's thread into this one.

    Raises:
      Refusal: too many requests wait.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, ask: Ask, seconds: float) -> None:
        self.ask, self._tokenizer = ask, tokenizer
        self._until = time.monotonic() + seconds
        loop, self._news = asyncio.get_running_loop(), asyncio.Queue[tuple[int, list[Token], str | None]]()
        starts = [len(text) if ask.echo else 0 for text, _ in ask.prompts for _ in range(ask.n)]
        self.texts = [Text(tokenizer, ask.stops, start) for start in starts]

        def deliver_to(index: int) -> Callable[[list[Token], str | None], None]:
            return lambda *news: loop.call_soon_threadsafe(self._news.put_nowait, (index, *news)) and None

        each = [(ids, how) for _, ids in ask.prompts for how in ask.samplings]
        self._requests = [
            Request(list(ids), ask.max_tokens, how, deliver_to(index), ask.alternatives or 0)
            for index, (ids, how) in enumerate(each)
        ]
        try:
            engine.submit(*self._requests)
        except Full:
            raise Refusal("too many requests wait; try again", None, 429, "queue_full") from None

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Pieces of the texts, by their numbers. Once it is left, the engine writes nothing more of them."""
        running = set(range(len(self.texts)))
        try:
            if self.ask.echo:
                for index in running:
                    yield index, Part(self.ask.prompts[index // self.ask.n][0])
            while running:
                try:
                    news = await asyncio.wait_for(self._news.get(), max(0, self._until - time.monotonic()))
                except TimeoutError:
                    if not any(text.count for text in self.texts):
                        raise Refusal("no place became free in time; try again", None, 503) from None
                    for index in running:
                        yield index, self.texts[index].feed([], "length")
                    return
                index, tokens, finish = news
                if finish == "error":
                    raise Refusal("the model failed; the server's log says how", None, 500)
                if index not in running:
                    continue
                part = self.texts[index].feed(tokens, finish)
                if part.finish:
                    running.discard(index)
                    self._requests[index].cancelled = True
                if part.text or part.tokens or part.finish:
                    yield index, part
        finally:
            for request in self._requests:
                request.cancelled = True

    def usage(self) -> dict[str, int]:
        read, new = sum(len(ids) for _, ids in self.ask.prompts), sum(text.count for text in self.texts)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def choice(self, index: int, part: Part, delta: bool) -> dict[str, Any]:
        tokens = part.tokens or []
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": part.finish}
        if self.ask.chat:
            choice["delta" if delta else "message"] = {"role": "assistant", "content": part.text}
            if self.ask.alternatives is not None:
                choice["logprobs"] = {"content": [self._entry(token) for _, token in tokens], "refusal": None}
            return choice
        choice["text"] = part.text
        if self.ask.alternatives is not None:
            choice["logprobs"] = {
                "tokens": [self._word(token.id) for _, token in tokens],
                "token_logprobs": [token.log_prob for _, token in tokens],
                "top_logprobs": [self._likely(token) for _, token in tokens] if self.ask.alternatives else None,
                "text_offset": [place for place, _ in tokens],
            }
        if self.ask.ids:
            choice["token_ids"] = [token.id for _, token in tokens]
        return choice

    def _word(self, token: int) -> str:
        return self._tokenizer.pieces[token].decode(errors="replace")

    def _likely(self, token: Token) -> dict[str, float]:
        return {self._word(other): value for other, value in reversed(token.alternatives)}  # of two alike, the likelier

    def _entry(self, token: Token) -> dict[str, Any]:
        entry = lambda one, value: {"token": self._word(one), "logprob": value, "bytes": [*self._tokenizer.pieces[one]]}
        return entry(token.id, token.log_prob) | {"top_logprobs": [entry(*other) for other in token.alternatives]}
