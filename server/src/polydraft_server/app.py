"""The ASGI app: routes, and how a request goes from its body to its answer."""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

from polydraft import Session
from polydraft.contract import Tokenizer
from polydraft.errors import PolydraftError
from polydraft.files import parse_json
from sse_starlette.event import ServerSentEvent
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from polydraft_server.admission import Admission
from polydraft_server.answers import Answer, ChatAnswer, CompletionAnswer, encoded
from polydraft_server.drafts import gives_text_only
from polydraft_server.gate import Gate
from polydraft_server.generation import Event, Job, Run
from polydraft_server.metrics import CONTENT_TYPE, Metrics
from polydraft_server.page import HEADERS, PAGE
from polydraft_server.problems import ApiError, Problem, problem_of
from polydraft_server.requests import ChatRequest, CompletionRequest, checked, client_of
from polydraft_server.served import Served, public_name
from polydraft_server.settings import ServerSettings

__all__ = ["Api", "create_app"]

log = logging.getLogger("polydraft.server")

_FIRST_EVENT_WITHIN = 5.0
"""Seconds in which a stream waits for its first token, so that an error has a status of its own; then it begins."""
_PING_EVERY = 10
"""Seconds between signs of life in a stream."""
_CLIENT_LEFT = 499
"""nginx's status for a client that left; nobody reads it."""
_SPARE_THREADS = 16
"""For encoding prompts, besides one thread for each generation and one to end it."""


def create_app(
    session: Session,
    settings: ServerSettings | None = None,
    *,
    load: Callable[[], Session] | None = None,
    local: bool = True,
) -> Starlette:
    """The app that serves a session; it closes the session when it shuts down.

    Args:
        session: The session.
        settings: Limits and names.
        load: Loads the same session again, after its engine's process has ended; None: it stays lost.
        local: Whether only this machine reaches it.
    """
    return Api(session, settings or ServerSettings(), load, local).app


class Api:
    """A served session, its queue and its endpoints."""

    def __init__(
        self, session: Session, settings: ServerSettings, load: Callable[[], Session] | None, local: bool
    ) -> None:
        running = session.running
        self.settings = settings
        self.served = Served(session, load)
        self.names = settings.names or (public_name(running.target),)
        self.admission = Admission(settings.running_at_once(session), settings.max_waiting)
        self.metrics = Metrics(
            self.names[0],
            lambda: self.admission.running,
            lambda: self.admission.waiting,
            running.max_draft_tokens,
        )
        self._body_limit = settings.body_limit(running.context_length)
        self._created = int(time.time())
        self._runs: set[Run] = set()
        self.hurry = False
        """Set to have ``stop`` wait no longer."""
        gate = Middleware(Gate, key=settings.key, local=local, host=settings.host, failed=self._failed)
        cors = Middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "x-polydraft-ignored", "retry-after"],
        )
        self.app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/ready", self._ready),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route("/v1/chat/completions", self._answering(self._chat), methods=["POST"]),
                Route("/v1/completions", self._answering(self._complete), methods=["POST"]),
            ],
            middleware=[cors, gate] if settings.origins else [gate],
            exception_handlers={HTTPException: self._no_route},
            lifespan=self._lifespan,
        )
        # A redirect would name the address that the client named, and plain HTTP behind a proxy's TLS.
        self.app.router.redirect_slashes = False
        self.app.state.api = self

    async def stop(self) -> None:
        """Take no more requests, give those under way their time, then tell the rest."""
        self.admission.stop()
        deadline = time.monotonic() + self.settings.stop_seconds
        while self._runs and time.monotonic() < deadline and not self.hurry:
            await asyncio.sleep(0.05)
        for run in list(self._runs):
            run.tell(
                ApiError.of(
                    503, "The server stops, and the answer was not finished in time.", code="server_stopping",
                    kind="server_error",
                )
            )  # fmt: skip

    # Endpoints --------------------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(PAGE, headers=HEADERS)

    async def _health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        ready = self.served.ready and not self.admission.stopping
        return _json({"status": "ready" if ready else "not ready"}, 200 if ready else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [self._described(name) for name in self.names]})

    async def _model(self, request: Request) -> Response:
        try:
            return _json(self._described(self._known(request.path_params["name"])))
        except ApiError as error:
            return self._error(error)

    async def _chat(self, request: Request) -> Response:
        asked = checked(ChatRequest, await self._body(request))
        model = self._known(asked.model)
        arguments = asked.arguments(self.settings.defaults, self.served.running.context_length)
        jobs = [
            Job(choice, asked.messages, asked.choice_arguments(arguments, choice), one_call=asked.one_call)
            for choice in range(asked.answers)
        ]
        tokenizer = self.served.session().tokenizer
        ids = bool(asked.return_token_ids)
        _refuse_ids(tokenizer, return_token_ids=ids)
        answer = ChatAnswer(model, tokenizer, len(jobs), one_call=asked.one_call, token_ids=ids)
        return await self._answer(request, asked, jobs, answer)

    async def _complete(self, request: Request) -> Response:
        asked = checked(CompletionRequest, await self._body(request))
        model = self._known(asked.model)
        prompts, arguments = asked.prompts(), asked.arguments(self.settings.defaults)
        jobs = [
            Job(asked.answers * at + choice, prompt, asked.choice_arguments(arguments, choice))
            for at, prompt in enumerate(prompts)
            for choice in range(asked.answers)
        ]
        tokenizer = self.served.session().tokenizer
        echoed = [str(job.prompt) for job in jobs] if asked.echo else None
        ids = bool(asked.return_token_ids)
        _refuse_ids(tokenizer, return_token_ids=ids, prompt=not isinstance(prompts[0], str))
        answer = CompletionAnswer(model, tokenizer, len(jobs), prompts=len(prompts), token_ids=ids, echoed=echoed)
        return await self._answer(request, asked, jobs, answer)

    # How a request is answered ----------------------------------------------------------------------------------------

    def _answering(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        """An endpoint whose errors are answers."""

        async def answer(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                self.metrics.cancelled()
                return Response(status_code=_CLIENT_LEFT)
            except Exception as error:
                return self._error(error)

        return answer

    async def _body(self, request: Request) -> Any:
        """The body's JSON.

        Raises:
            ApiError: It is too large or too slow, or no JSON.
        """
        too_large = ApiError.of(
            413,
            f"The request is larger than {self._body_limit} bytes.",
            "Send less, or have the server's limit raised (`--max-body-bytes`).",
            code="request_too_large",
        )
        length = request.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and (len(length) > 18 or int(length) > self._body_limit):
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.read_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > self._body_limit:
                        raise too_large
        except TimeoutError:
            raise ApiError.of(
                408, f"The request did not arrive within {self.settings.read_seconds:g} seconds.", code="timeout"
            ) from None
        try:
            return parse_json(bytes(body))
        except UnicodeDecodeError:
            why = "not JSON: it is not UTF-8"
        except json.JSONDecodeError as error:
            why = f"not JSON: {error.msg[:1].lower()}{error.msg[1:]} at line {error.lineno}, column {error.colno}"
        except ValueError as error:
            why = f"not usable as JSON: {error}"
        raise ApiError.of(400, f"The body is {why}.", "Send a JSON object in UTF-8.", code="invalid_json")

    def _known(self, name: str | None) -> str:
        """The name that a request calls the model by.

        Raises:
            ApiError: There is no such model here.
        """
        if name is None or name in self.names:
            return name or self.names[0]
        shown = name if len(name) <= 100 else f"{name[:100]}..."
        close = difflib.get_close_matches(name[:200], self.names, n=1, cutoff=0.4)
        hint = (
            f"Did you mean `{close[0]}`?"
            if close
            else f"This server has {', '.join(f'`{one}`' for one in self.names)}."
        )
        raise ApiError.of(404, f"There is no model `{shown}` here.", hint, code="model_not_found", param="model")

    async def _answer(
        self, request: Request, asked: ChatRequest | CompletionRequest, jobs: list[Job], answer: Answer
    ) -> Response:
        client = client_of(asked, request.client.host if request.client else "")
        run = Run(
            self.served,
            self.admission.admit(client, len(jobs)),
            jobs,
            self.settings.request_seconds,
            self.metrics,
        )
        self._runs.add(run)
        headers = self._told(request, asked)
        try:
            await run.open()
            if asked.stream:
                first = await self._first(run, request)
                return _Stream(self, run, answer, first, asked, headers)
            await _unless_gone(_read(run, answer), request)
        except BaseException as error:
            await self._close(run)
            if isinstance(error, PolydraftError):
                raise ApiError(problem_of(error, asked.fields)) from error
            raise
        await self._close(run)
        return _json(answer.whole(), headers=headers)

    async def _first(self, run: Run, request: Request) -> asyncio.Task[Event | None]:
        """The task that gives a stream's first event: ended, unless that takes long.

        Raises:
            ClientDisconnect: The client left meanwhile.
            Exception: What the generation raised.
        """
        event = asyncio.create_task(run.next())
        gone = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({event, gone}, timeout=_FIRST_EVENT_WITHIN, return_when=asyncio.FIRST_COMPLETED)
            if event.done():
                event.result()
            elif gone.done():
                event.cancel()
                raise ClientDisconnect
        except BaseException:
            event.cancel()
            raise
        finally:
            gone.cancel()
        return event

    async def _close(self, run: Run) -> None:
        try:
            await run.close()
        finally:
            self._runs.discard(run)

    def _told(self, request: Request, asked: ChatRequest | CompletionRequest) -> dict[str, str]:
        """The header that tells fields without effect."""
        ignored = asked.ignored()
        if not ignored:
            return {}
        shown = ", ".join(ignored)
        log.info("%s: ignored unknown fields: %s", request.state.request_id, shown)
        return {"x-polydraft-ignored": shown}

    # Errors -----------------------------------------------------------------------------------------------------------

    def _failed(self, problem: Problem) -> None:
        self.metrics.failed(problem.kind, problem.code)

    def problem(self, error: BaseException, fields: Mapping[str, str]) -> Problem:
        """What a client is told of an error, which is counted. ``fields``: as of ``problem_of``."""
        problem = problem_of(error, fields)
        self._failed(problem)
        return problem

    def _error(self, error: BaseException) -> Response:
        problem = self.problem(error, {})
        return _json(problem.body(), problem.status, problem.headers())

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        paths = [route.path for route in self.app.routes if isinstance(route, Route)]
        if error.status_code == 405:
            message, hint = f"{request.method} is not allowed here.", f"Use {(error.headers or {}).get('Allow', '')}."
        else:
            close = difflib.get_close_matches(request.url.path[:200], paths, n=1)
            message = f"There is no {request.url.path[:100]} here."
            hint = f"Did you mean {close[0]}?" if close else "The API is under /v1."
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
        problem = Problem(error.status_code, f"{message} {hint}", code=code)
        self._failed(problem)
        return _json(problem.body(), problem.status, dict(error.headers or {}))

    # The rest ---------------------------------------------------------------------------------------------------------

    def _described(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "polydraft",
            "max_model_len": self.served.running.context_length,
            "polydraft": self.served.described(),
        }

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        # The steps of generations run in threads: with fewer, they would wait for one another.
        threads = ThreadPoolExecutor(2 * self.admission.limit + _SPARE_THREADS, thread_name_prefix="polydraft-server")
        asyncio.get_running_loop().set_default_executor(threads)
        try:
            yield
        finally:
            await self.served.close()


class _Stream(EventSourceResponse):
    """A stream of server-sent events; however it ends, its generations end with it."""

    def __init__(
        self,
        api: Api,
        run: Run,
        answer: Answer,
        first: asyncio.Task[Event | None],
        asked: ChatRequest | CompletionRequest,
        headers: dict[str, str],
    ) -> None:
        super().__init__(
            self._events(api, run, answer, first, asked),
            headers=headers,
            ping=_PING_EVERY,
            sep="\n",
            send_timeout=api.settings.write_seconds,
        )
        self._api = api
        self._run = run
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.warning("%s: the client does not read its stream; closed.", scope["state"]["request_id"])
            abort = scope["state"].get("abort")
            if abort is not None:
                abort()
        finally:
            if not self._run.ended:
                self._api.metrics.cancelled()
            self._first.cancel()
            with suppress(asyncio.CancelledError):
                await self._api._close(self._run)

    async def _events(
        self,
        api: Api,
        run: Run,
        answer: Answer,
        first: asyncio.Task[Event | None],
        asked: ChatRequest | CompletionRequest,
    ) -> AsyncIterator[ServerSentEvent]:
        try:
            for part in answer.beginning():
                yield _sse(part)
            event = await first
            while event is not None:
                for part in answer.parts(*event):
                    yield _sse(part)
                event = await run.next()
            if asked.wants_usage:
                yield _sse(answer.usage())
            yield ServerSentEvent(data="[DONE]", sep="\n")
        except Exception as error:
            yield _sse(api.problem(error, asked.fields).body())


def _refuse_ids(tokenizer: Tokenizer, **fields: bool) -> None:
    """Refuse fields that are about token ids where there are none."""
    for field, given in fields.items():
        if given and gives_text_only(tokenizer):
            raise ApiError.of(
                400,
                f"`{field}` asks for token ids, and the engine gives text, not tokens.",
                "Give the prompt as text, and leave `return_token_ids` out.",
                code="unsupported",
                param=field,
            )


def _sse(data: Any) -> ServerSentEvent:
    return ServerSentEvent(data=encoded(data).decode(), sep="\n")


async def _gone(request: Request) -> None:
    """Wait until the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read(run: Run, answer: Answer) -> None:
    while (event := await run.next()) is not None:
        answer.add(*event)


async def _unless_gone(work: Coroutine[Any, Any, None], request: Request) -> None:
    """Do what a request is answered with.

    Raises:
        ClientDisconnect: Its client has left meanwhile.
    """
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        working.result()
    finally:
        working.cancel()
        gone.cancel()


def _json(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(encoded(data), status, headers, "application/json")
