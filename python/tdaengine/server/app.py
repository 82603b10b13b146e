"""The application: which path does what."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from .._native import Error, GenerateOptions, OptionError
from ..conversation import chat_sampling
from ..engine import Engine
from ..grammar import Grammar
from .answer import Answer
from .complaints import invalid
from .faults import ApiError, Told
from .fields import (
    MOST_CHOICES,
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    Sampling,
)
from .forms import ChatForm, CompletionForm, Form, ResponseForm
from .gate import Gate, Rules
from .markdown import to_html
from .metrics import Metrics
from .scheduler import Scheduler, Work
from .work import Choice, Generating, Scoring, check_prompt

COMPLETION_TOKENS = 16  # of /v1/completions where a request says nothing, as OpenAI has it
PAGE = Path(__file__).with_name("page")
PAGE_FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
# The page loads nothing from elsewhere and runs no script but its own, whatever a model writes.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Settings:
    """Of the command line."""

    model: str  # its name in requests
    rules: Rules
    parallel: int = 8
    queue: int = 64
    cors: tuple[str, ...] = ()


class Service:
    """An engine behind the API."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.model = engine, settings.model
        self.started = int(time.time())
        # The engine would keep to its limit alone, but not tell who waits, nor let those wait who
        # have no thread yet. What has its place here finds its memory there.
        cache_memory = engine.cache_memory or float("inf")
        self.scheduler = Scheduler(settings.parallel, settings.queue, cache_memory)
        self.told = Told(engine.path, settings.model)
        self.metrics = Metrics(self.scheduler.gauges())
        most_tokens = cache_memory / engine.kv_bytes_per_token
        if most_tokens < 2:
            raise OptionError(
                f"--cache-memory: found {cache_memory} bytes, expected at least "
                f"{2 * engine.kv_bytes_per_token}, the KV cache of two tokens"
            )
        self._most_tokens = int(min(engine.max_context, most_tokens))  # of one answer
        # Where a request says nothing: as the checkpoint says, else as OpenAI's servers do.
        self._sampling = chat_sampling(engine.path, temperature=1.0, top_p=1.0)
        engine.tokenizer  # noqa: B018  raises where there is none
        # In words, without the files it is from. Raises what is wrong with it.
        self.tda = engine.start([0], GenerateOptions(max_new_tokens=1), engine.tda).stats.tda

    def check_model(self, name: str) -> None:
        if name != self.model:
            message = f"model: found {name[:100]!r}, expected {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def model_fields(self) -> dict[str, Any]:
        engine = self.engine
        return {
            "id": self.model,
            "object": "model",
            "created": self.started,
            "owned_by": "tdaengine",
            "max_context": engine.max_context,
            "weights": engine.weights,
            "fingerprint": engine.fingerprint,
            "tda": self.tda,
        }

    async def chat(self, body: ChatRequest) -> Answer:
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(
                400,
                "max_tokens: found max_completion_tokens, too, expected one: they are the same",
                param="max_tokens",
                code="invalid_value",
            )
        most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        grammar, tools = body.grammar(), body.offered_tools()
        if tools and not self.engine.chat_template.takes_tools:
            raise ApiError(
                400,
                f"tools: found {len(tools)}, expected none: this model's chat template takes none",
                param="tools",
                code="unsupported_parameter",
            )
        await self._check_grammar(grammar, "tools" if body.is_forced() else "response_format")
        ids = await self._chat_ids(body.plain(), tools)
        count = body.n or 1
        choices = self._choices(body, [(ids, "")], most, count, grammar)
        form = ChatForm(*self._names(), count, has_tools=bool(tools), **self._shown(body))
        return self._answer(body, choices, form)

    async def completion(self, body: CompletionRequest) -> Answer:
        prompts, count = body.prompts(), body.n or 1
        if not 1 <= len(prompts) * count <= MOST_CHOICES:
            raise ApiError(
                400,
                f"prompt: found {len(prompts)} prompts with n {count}, expected 1 to "
                f"{MOST_CHOICES} answers",
                param="prompt",
                code="invalid_value",
            )
        encoded = [await run_in_threadpool(self._encode, prompt, body.echo) for prompt in prompts]
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        form = CompletionForm(*self._names(), count, **self._shown(body))
        if body.logprobs is None or not body.echo:
            if most == 0:
                message = "max_tokens: found 0, expected 1 or more, or 0 with echo and logprobs"
                raise ApiError(400, message, param="max_tokens", code="invalid_value")
            return self._answer(body, self._choices(body, encoded, most, count), form)
        _check_scoring(body, most)
        choices = self._choices(body, encoded, 1, 1)
        work = Scoring(self.engine, choices, body.logprobs, has_new=most == 1)
        return self._answering([work], form, is_stream=False)

    async def response(self, body: ResponsesRequest) -> Answer:
        grammar = body.grammar()
        await self._check_grammar(grammar, "text")
        ids = await self._chat_ids(body.messages())
        choices = self._choices(body, [(ids, "")], body.max_output_tokens, 1, grammar)
        return self._answer(body, choices, ResponseForm(*self._names()))

    def _names(self) -> tuple[str, str]:
        return self.model, self.engine.fingerprint

    def _shown(self, body: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """What answers show beside their text."""
        options, likeliest = body.stream_options, body.likeliest()
        return {
            "include_usage": options is not None and options.include_usage,
            "tokenizer": None if likeliest is None else self.engine.tokenizer,
            "likeliest": likeliest or 0,
        }

    async def _check_grammar(self, grammar: Grammar | None, field: str) -> None:
        """What is wrong with it is said before the request waits for its turn."""
        if grammar is None:
            return
        try:
            await run_in_threadpool(self.engine.check_grammar, grammar)
        except OptionError as error:
            message = f"{field}: {str(error).removeprefix('grammar: ')}"
            raise ApiError(400, message, param=field, code="invalid_value") from error

    async def _chat_ids(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None
    ) -> list[int]:
        """Special tokens that messages spell out stay text: messages are from others."""
        prompt = self.engine.chat_prompt
        return await run_in_threadpool(prompt, messages, parse_special=False, tools=tools)

    def _encode(self, prompt: str | list[int], echo: bool | None) -> tuple[list[int], str]:
        ids = list(self.engine._encode(prompt))
        if not echo:
            return ids, ""
        return ids, prompt if isinstance(prompt, str) else self.engine.tokenizer.decode(ids)

    def _choices(
        self,
        body: Sampling,
        prompts: list[tuple[list[int], str]],
        most: int | None,
        count: int,
        grammar: Grammar | None = None,
    ) -> list[Choice]:
        """`count` of each prompt, (token ids, what is echoed); of the seed each has its own."""
        tda = body.setting()
        name = "prompt" if isinstance(body, CompletionRequest) else "messages"
        choices: list[Choice] = []
        for ids, echo in prompts:
            room = max(1, self._most_tokens - len(ids)) if most is None else most
            check_prompt(self.engine, name, ids, room, self.scheduler.places.most_bytes)
            for _ in range(count):
                index = len(choices)
                seed = None if body.seed is None else (body.seed + index) % 2**64
                options = GenerateOptions(
                    max_new_tokens=room,
                    logprobs=body.likeliest(),
                    **{**self._sampling, **body.sampling(), "seed": seed},
                )
                choices.append(Choice(index, ids, options, body.stops(), tda, echo, grammar))
        return choices

    def _answer(self, body: Any, choices: list[Choice], form: Form) -> Answer:
        options = body.stream_options
        if options is not None and not body.stream:
            message = "stream_options: expected only with stream"
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        has_stats = options is not None and options.include_stats
        works = [Generating(self.engine, choice, has_stats) for choice in choices]
        return self._answering(works, form, is_stream=bool(body.stream))

    def _answering(self, works: Sequence[Work], form: Form, is_stream: bool) -> Answer:
        return Answer(self.scheduler, self.metrics, self.told, works, form, is_stream)


def _check_scoring(body: CompletionRequest, most: int) -> None:
    """With echo log-probabilities come from a prompt's prefill, not from generating."""
    fault = None
    if most > 1:
        fault = "max_tokens", "expected 0 or 1"
    elif most == 1 and body.temperature != 0:
        fault = "temperature", "expected 0 with max_tokens 1"
    elif body.stream:
        fault = "stream", "expected none"
    elif body.n not in (None, 1):
        fault = "n", "expected 1"
    else:
        changing = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
        for name in ("stop", "tda", *changing):
            if getattr(body, name):  # neither left out nor false
                fault = name, "expected none"
    if fault is not None:
        name, reason = fault
        raise ApiError(
            400,
            f"{name}: {reason}: with echo and logprobs a prompt is scored, dense",
            param=name,
            code="unsupported_parameter",
        )


def make_app(service: Service, settings: Settings) -> FastAPI:
    app = FastAPI(title="tdaengine", docs_url=None, redoc_url=None, openapi_url=None)
    _add_api(app, service)
    _add_rest(app, service)
    _add_page(app)
    app.add_exception_handler(RequestValidationError, _invalid)

    async def failed(request: Request, error: Exception) -> Response:
        return _logged(request, service.told(error, request.scope["record"].id))

    app.add_exception_handler(HTTPException, failed)
    app.add_exception_handler(Error, failed)
    paths = frozenset(route.path for route in app.routes if hasattr(route, "path"))
    app.add_middleware(Gate, rules=settings.rules, metrics=service.metrics, paths=paths)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [service.model_fields()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> JSONResponse:
        service.check_model(name)
        return JSONResponse(service.model_fields())

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest) -> Response:
        service.check_model(body.model)
        return await service.chat(body)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Response:
        service.check_model(body.model)
        return await service.completion(body)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest) -> Response:
        service.check_model(body.model)
        return await service.response(body)


def _add_rest(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    def sending(name: str, media_type: str) -> Callable[[], Any]:
        content = (PAGE / name).read_bytes()

        async def send() -> Response:
            return Response(content, headers=PAGE_HEADERS, media_type=media_type)

        return send

    @app.post("/markdown", include_in_schema=False)
    async def markdown(text: Annotated[str, Body(embed=True)]) -> Response:
        html = await run_in_threadpool(to_html, text)
        return Response(html, media_type="text/html; charset=utf-8", headers=PAGE_HEADERS)

    for path, (name, media_type) in PAGE_FILES.items():
        app.add_api_route(path, sending(name, media_type), include_in_schema=False)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _logged(request, invalid(error.errors()))


def _logged(request: Request, error: ApiError) -> Response:
    request.scope["record"].fields["error"] = error.code
    return error.response()
