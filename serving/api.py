"""The endpoints: OpenAI's completions and chat, and the page. Every parameter is obeyed, or refused by its name."""

import asyncio
import base64
import hashlib
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as Call
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from corpus.tokenizer import Tokenizer, UnknownCharacters, UpTo
from reports.sinks import sink_shares_by_position
from runtime.files import read_file
from serving.engine import ALTERNATIVES, Engine, Full, Request, Token
from transformer.sampling import Sampling, power_of_two, prompt_tokens

_LARGEST_BODY = 2**20
# Parameters that change nothing, with any value, and with the value given here.
_HARMLESS = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_HARMLESS |= {"include_obfuscation", "parallel_tool_calls", "tool_choice"}  # tools are refused
_NEUTRAL: dict[str, Any] = {"frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "suffix": ""}
_NEUTRAL |= {"tools": [], "response_format": {"type": "text"}}


class Refusal(HTTPException):
    """An answer in OpenAI's form of errors."""

    def __init__(self, message: str, param: Any = None, status: int = 400, code: str | None = None):
        super().__init__(status, message, {"Retry-After": "1"} if status in (429, 503) else {})
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _answer_error(call: Call, error: Exception) -> Response:
    if isinstance(error, ValidationError):
        first, *others = error.errors(include_url=False)
        name = first["loc"][0] if first["loc"] else None
        reasons = dict.fromkeys(e["msg"] for e in [first, *others] if e["loc"][:1] == first["loc"][:1])
        message = "; or ".join(reasons)  # of a parameter that may have one of several types
        error = Refusal(f"{name}: {message} (got {first['input']!r:.80})" if name else message, name)
    elif not isinstance(error, HTTPException):
        error = Refusal("an error inside the server; see its log", None, 500)
    elif not isinstance(error, Refusal):
        error = Refusal(f"{call.method} {call.url.path}: {error.detail}", None, error.status_code)
    return JSONResponse(error.body, error.status_code, error.headers)


# --- What is asked for ------------------------------------------------------------------------------------------------

Ids = Annotated[list[NonNegativeInt], Field(min_length=1, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_what_changes_nothing(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        left_out = lambda name, value: name in _HARMLESS or value is None or value == _NEUTRAL.get(name)
        return {name: value for name, value in body.items() if not left_out(name, value)}


class StreamOptions(_Body):
    include_usage: bool = False


class Ask(_Body):
    """The parameters of both endpoints."""

    n: int = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbelow(2**31), ge=0, lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None


class Completion(Ask):
    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=1024, fail_fast=True)] = ""
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    return_token_ids: bool = False
    chat: bool = False  # a prompt that is text is what a user says
    kind: ClassVar = "cmpl", "text_completion", "text_completion"


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: str
    content: str | list[TextPart]


class Chat(Ask):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=ALTERNATIVES)
    echo: ClassVar[bool] = False
    kind: ClassVar = "chatcmpl", "chat.completion", "chat.completion.chunk"


class Written(_Body):
    prompt: str | Ids = ""
    token_ids: Ids
    chat: bool = False


# --- What is answered -------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A piece of a text, or all of it: characters, tokens with the place where each begins, and why it ended."""

    text: str = ""
    tokens: list[tuple[int, Token]] = field(default_factory=list)
    finish: str | None = None

    def __add__(self, part: "Part") -> "Part":
        return Part(self.text + part.text, self.tokens + part.tokens, part.finish)


class Text:
    """One text as it comes: tokens in, whole characters up to a stop out, each token when all of it is out."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], start: int):
        self._ends, self._decoder, self._cut = tokenizer.ends, tokenizer.text_stream(), UpTo(stops)
        self._came = self._out = start  # characters: decoded, given out
        self._held: list[tuple[int, int, Token]] = []  # tokens with the places where they begin and end
        self.count = 0  # of tokens

    def feed(self, tokens: list[Token], finish: str | None) -> Part:
        text = ""
        for token in tokens:
            self.count += 1
            if token.id not in self._ends:
                begin, piece = self._came, self._decoder.feed([token.id])
                self._came += len(piece)
                self._held.append((begin, self._came, token))
                text += self._cut.feed(piece)
                if self._cut.ended:
                    finish = "stop"
                    break
        if last := bool(finish) and not self._cut.ended:
            text += self._cut.feed(self._decoder.flush()) + self._cut.flush()
        self._out += len(text)
        held, ended = self._held, self._cut.ended
        count = sum(last or (begin < self._out and (ended or end <= self._out)) for begin, end, _ in held)
        out, self._held = held[:count], held[count:]
        return Part(text, [(begin, token) for begin, _, token in out], finish)


class Service:
    """The endpoints of one model.

    `chat_tokens` gives the ids of a conversation, up to where the assistant's next words begin; it is None if the model
    was not trained on any, and the client reads its ValueError. `hosts` are the names under which it may be called, or
    any: on loopback, another name comes from a web page whose name was made to lead to this machine.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,  # the model's
        max_tokens: int = 4096,  # new ones that a request may ask for, of each text
        seconds: float = 600,  # after which a text ends
        chat_tokens: Callable[[list[dict[str, str]]], Sequence[int]] | None = None,
        hosts: Sequence[str] = (),
    ) -> None:
        self.engine, self.tokenizer, self.max_tokens, self.seconds = engine, tokenizer, max_tokens, seconds
        self._config, self._chat_tokens, self._hosts = engine.model.config, chat_tokens, hosts
        self._model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "you"}
        self._model |= {"max_model_len": self._config.context_len, "max_tokens": self.max_tokens}
        self._model |= {"attention_sink": self._config.has_sinks, "chat": chat_tokens is not None}
        self._measuring = ThreadPoolExecutor(1)
        self._page = read_file(Path(__file__).with_name("page.html")).decode()
        inside = [re.search(f"<{tag}>(.*?)</{tag}>", self._page, re.DOTALL)[1] for tag in ("script", "style")]
        script, style = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in inside)
        policy = f"default-src 'none'; connect-src 'self'; img-src data:; script-src 'sha256-{script}'"
        policy += f"; style-src 'sha256-{style}'; base-uri 'none'; frame-ancestors 'self'"
        self._headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}

    def app(self) -> Starlette:
        answers = {
            **{("GET", "/"): self._show, ("GET", "/v1/models"): self._models},
            **{("GET", "/v1/models/{name:path}"): self._one_model, ("POST", "/v1/completions"): self._complete},
            **{("POST", "/v1/chat/completions"): self._chat, ("POST", "/sinks"): self._sinks},
        }
        routes = [Route(path, self._guarded(answer), methods=[verb]) for (verb, path), answer in answers.items()]
        errors = dict.fromkeys([HTTPException, ValidationError, Exception], _answer_error)
        return Starlette(routes=routes, exception_handlers=errors)

    def _guarded(self, answer: Callable[..., Any]) -> Callable[[Call], Any]:
        async def guarded(call: Call) -> Response:
            if self._hosts and call.url.hostname not in self._hosts:
                raise Refusal(f"Host {call.url.hostname}: this server answers to {', '.join(self._hosts)}", None, 403)
            if call.method != "POST":
                return await answer(call)
            # The pages of other sites cannot send this type.
            if not call.headers.get("content-type", "").startswith("application/json"):
                raise Refusal("Content-Type: must be application/json", None, 415)
            data = b""
            async for part in call.stream():
                data += part
                if len(data) > _LARGEST_BODY:
                    raise Refusal(f"the request has more than {_LARGEST_BODY:,} bytes", None, 413)
            return await answer(call, data)

        return guarded

    async def _show(self, call: Call) -> Response:
        return HTMLResponse(self._page, headers=self._headers)

    async def _models(self, call: Call) -> Response:
        return JSONResponse({"object": "list", "data": [self._model]})

    async def _one_model(self, call: Call) -> Response:
        if call.path_params["name"] != self._model["id"]:
            raise Refusal(f"there is no model {call.path_params['name']!r}", "model", 404, "model_not_found")
        return JSONResponse(self._model)

    async def _complete(self, call: Call, body: bytes) -> Response:
        ask = Completion.model_validate_json(body)
        if ask.echo and ask.logprobs is not None:
            raise Refusal("echo: not together with logprobs", "echo")
        one = isinstance(ask.prompt, str) or isinstance(ask.prompt[0], int)
        prompts = [self._read(prompt, chat=ask.chat) for prompt in ([ask.prompt] if one else ask.prompt)]
        return await self._answer(call, ask, prompts, ("max_tokens", ask.max_tokens or min(16, self.max_tokens)))

    async def _chat(self, call: Call, body: bytes) -> Response:
        ask = Chat.model_validate_json(body)
        if ask.top_logprobs and not ask.logprobs:
            raise Refusal("top_logprobs: needs logprobs to be true", "top_logprobs")
        flat = lambda content: content if isinstance(content, str) else "".join(part.text for part in content)
        ids = self._turns([{"role": m.role, "content": flat(m.content)} for m in ask.messages], "messages")
        name = "max_completion_tokens" if ask.max_completion_tokens else "max_tokens"
        most = getattr(ask, name) or self.max_tokens
        return await self._answer(call, ask, [("", ids)], (name, most))

    def _turns(self, messages: list[dict[str, str]], name: str) -> list[int]:
        if self._chat_tokens is None:
            raise Refusal("this model was not trained on conversations (configs/chat.py)", name)
        try:
            return list(map(int, self._chat_tokens(messages)))
        except ValueError as error:  # UnknownCharacters too
            raise Refusal(f"{name}: {error}", name) from error

    def _read(self, prompt: str | list[int], name: str = "prompt", chat: bool = False) -> tuple[str, list[int]]:
        """A prompt's text and ids; with `chat`, text is what a user says."""
        if isinstance(prompt, list):
            if max(prompt) >= self._config.vocab_size:
                raise Refusal(f"{name}: ids must be below {self._config.vocab_size}", name)
            return b"".join(self.tokenizer.pieces[i] for i in prompt).decode(errors="replace"), prompt
        if chat:
            return prompt, self._turns([{"role": "user", "content": prompt}], name)
        try:
            return prompt, prompt_tokens(self.tokenizer, prompt).tolist()
        except UnknownCharacters as error:
            raise Refusal(f"prompt: {error}", "prompt") from error

    async def _answer(
        self, call: Call, ask: Completion | Chat, prompts: list[tuple[str, list[int]]], most: tuple[str, int]
    ) -> Response:
        if most[1] > self.max_tokens:
            raise Refusal(f"{most[0]}: must be at most {self.max_tokens}, got {most[1]}", most[0])
        if ask.stream_options and not ask.stream:
            raise Refusal("stream_options: only with stream", "stream_options")
        if (texts := len(prompts) * ask.n) > self.engine.places:
            name = "prompt" if ask.n == 1 else "n"
            raise Refusal(f"{name}: {texts} texts at once; this server takes at most {self.engine.places}", name)
        for _, ids in prompts:
            if len(ids) > (room := self._config.context_len):
                name = "messages" if isinstance(ask, Chat) else "prompt"
                message = f"the prompt has {len(ids)} tokens; the model reads {room}"
                raise Refusal(message, name, code="context_length_exceeded")
        writing = Writing(self, ask, prompts, most[1])
        prefix, *objects = ask.kind
        head = {"id": f"{prefix}-{secrets.token_hex(12)}", "object": objects[ask.stream]}
        head |= {"created": int(time.time()), "model": self._model["id"]}
        if ask.stream:
            return StreamingResponse(writing.events(head), media_type="text/event-stream")
        work, gone = asyncio.ensure_future(writing.whole(head)), asyncio.ensure_future(_gone(call))
        try:
            await asyncio.wait([work, gone], return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(work.result()) if work.done() else Response(status_code=499)
        finally:
            work.cancel()
            gone.cancel()

    async def _sinks(self, call: Call, body: bytes) -> Response:
        """How much each layer gave to its sinks where it chose each token of a text; null before the context."""
        ask = Written.model_validate_json(body)
        if not self._config.has_sinks:
            raise Refusal("this model has no attention sinks", None, 404)
        (_, prompt), (_, new) = self._read(ask.prompt, chat=ask.chat), self._read(ask.token_ids, "token_ids")
        ids = [*prompt, *new][:-1][-self._config.context_len :]
        tokens_T = np.zeros(min(self._config.context_len, power_of_two(len(ids))), np.int32)
        tokens_T[: len(ids)] = ids
        measure = lambda: np.round(np.asarray(sink_shares_by_position(self.engine.model, tokens_T)), 5)
        shares_TL = await asyncio.get_running_loop().run_in_executor(self._measuring, measure)
        shares = shares_TL[: len(ids)][-len(new) :].tolist()
        return JSONResponse({"shares": [None] * (len(new) - len(shares)) + shares})


async def _gone(call: Call) -> None:
    while (await call.receive())["type"] != "http.disconnect":
        pass


class Writing:
    """The texts of one request. Raises Refusal if too many requests wait."""

    def __init__(self, service: Service, ask: Completion | Chat, prompts: list[tuple[str, list[int]]], max_tokens: int):
        loop = asyncio.get_running_loop()
        self._ask, self._tokenizer, self._until = ask, service.tokenizer, loop.time() + service.seconds
        self._news: asyncio.Queue[tuple[int, list[Token], str | None]] = asyncio.Queue()
        self._echoes = [text if ask.echo else "" for text, _ in prompts for _ in range(ask.n)]
        stops = [ask.stop] if isinstance(ask.stop, str) else ask.stop
        self._texts = [Text(service.tokenizer, stops, len(echo)) for echo in self._echoes]
        self._prompt_tokens = sum(len(ids) for _, ids in prompts)
        alternatives = (ask.top_logprobs if isinstance(ask, Chat) else ask.logprobs) or 0
        top_p, seeds = max(ask.top_p, 1e-9), [(ask.seed + i) % 2**63 for i in range(ask.n)]  # 0: the likeliest token
        texts = [(ids, Sampling(ask.temperature, top_p=top_p, seed=seed)) for _, ids in prompts for seed in seeds]
        put = lambda *news: loop.call_soon_threadsafe(self._news.put_nowait, news)
        self._requests = [
            Request(list(ids), max_tokens, how, partial(put, index), alternatives)
            for index, (ids, how) in enumerate(texts)
        ]
        try:
            service.engine.submit(*self._requests)
        except Full:
            raise Refusal("too many requests wait; try again", None, 429, "queue_full") from None

    async def events(self, head: dict[str, Any]) -> AsyncIterator[str]:
        event = lambda value: f"data: {json.dumps(value)}\n\n"
        told = bool(self._ask.stream_options and self._ask.stream_options.include_usage)
        try:
            usage = {"usage": None} if told else {}
            opening = {"logprobs": None, "finish_reason": None, "delta": {"role": "assistant", "content": ""}}
            for index in range(len(self._texts) if isinstance(self._ask, Chat) else 0):
                # Once: clients put the pieces of each field together.
                yield event(head | {"choices": [{"index": index} | opening]} | usage)
            async with aclosing(self._parts()) as parts:
                async for index, part in parts:
                    yield event(head | {"choices": [self._choice(index, part, "delta")]} | usage)
            if told:
                yield event(head | {"choices": [], "usage": self._usage()})
        except Refusal as refusal:
            yield event(refusal.body)
        finally:
            self._give_up()
        yield "data: [DONE]\n\n"

    def _give_up(self) -> None:
        """What is still being written is wanted no more."""
        for request in self._requests:
            request.cancelled = True

    async def whole(self, head: dict[str, Any]) -> dict[str, Any]:
        whole = [Part() for _ in self._texts]
        async for index, part in self._parts():
            whole[index] += part
        choices = [self._choice(index, part, "message") for index, part in enumerate(whole)]
        return head | {"choices": choices, "usage": self._usage()}

    async def _parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Pieces of the texts, by their numbers. When this ends, the engine writes nothing more of them."""
        running = set(range(len(self._texts)))
        try:
            for index, echo in enumerate(self._echoes):
                if echo:
                    yield index, Part(echo)
            while running:
                try:
                    async with asyncio.timeout_at(self._until):  # `wait_for` of Python 3.11 can lose a cancellation
                        index, tokens, finish = await self._news.get()
                except TimeoutError:
                    if not any(text.count for text in self._texts):
                        raise Refusal("no place became free in time; try again", None, 503) from None
                    for index in running:
                        yield index, self._texts[index].feed([], "length")
                    return
                if finish == "error":
                    raise Refusal("the model failed; the server's log says how", None, 500)
                if index in running:
                    part = self._texts[index].feed(tokens, finish)
                    if part.finish:
                        running.discard(index)
                        self._requests[index].cancelled = True
                    if part != Part():
                        yield index, part
        finally:
            self._give_up()

    def _usage(self) -> dict[str, int]:
        read, new = self._prompt_tokens, sum(text.count for text in self._texts)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def _choice(self, index: int, part: Part, name: str) -> dict[str, Any]:
        ask, pieces = self._ask, self._tokenizer.pieces
        word = lambda token: pieces[token].decode(errors="replace")
        choice: dict[str, Any] = {"index": index, "logprobs": None, "finish_reason": part.finish}
        told = [(token.id, token.log_prob, token.alternatives) for _, token in part.tokens]
        if isinstance(ask, Chat):
            entry = lambda token, log_prob: {"token": word(token), "logprob": log_prob, "bytes": [*pieces[token]]}
            if ask.logprobs:
                content = [entry(*own) | {"top_logprobs": [entry(*other) for other in others]} for *own, others in told]
                choice["logprobs"] = {"content": content, "refusal": None}
            role = {"role": "assistant"} if name == "message" else {}
            return choice | {name: role | {"content": part.text}}
        if ask.logprobs is not None:
            likely = [{word(token): value for token, value in reversed(others)} for *_, others in told]
            choice["logprobs"] = {
                "tokens": [word(token) for token, *_ in told],
                "token_logprobs": [log_prob for _, log_prob, _ in told],
                "top_logprobs": likely if ask.logprobs else None,  # of two that look alike, the likelier
                "text_offset": [place for place, _ in part.tokens],
            }
        ids = {"token_ids": [token for token, *_ in told]} if ask.return_token_ids else {}
        return choice | {"text": part.text} | ids
