"""The server's HTTP side: a page for people, JSON for programs, one sentence for whoever asks for what cannot be.

    GET  /                    the page
    POST /api/images          {"prompt": "…", "seed": 3} -> 202, what GET says of the request
    GET  /api/images/ID       {"id", "prompt", "seed", "state", …}; see `queue.Queue.view`
    GET  /api/images/ID.png   the image, once the state is "done"
    DELETE /api/images/ID     takes back a request that waits
    POST /api/draw            as POST /api/images, and waits: 200 is the image itself
    GET  /healthz             200 where images are drawn, else 503

Errors are {"error": "a sentence"}. Only JSON is read, which no page from elsewhere can send without asking first, and
nothing here says that it may.
"""

import asyncio
import importlib.resources
import re
import secrets
from collections.abc import Collection
from typing import Annotated, Any

import fastapi
import pydantic
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from unclip_jax import pages
from unclip_jax.errors import InputError, nearest
from unclip_jax.serving import guard, queue
from unclip_jax.serving.artifact import Artifact
from unclip_jax.serving.guard import error

MOST_SEED = 2**31 - 1
_EXAMPLE = '{"prompt": "a small red star", "seed": 3}'
# How often it is looked whether who waits for an image is still there.
_LOOK_SECONDS = 0.5
# Ways that a request ends without an image -> status.
_STATUS = {queue.FAILED: 500, queue.STOPPED: 503}
# What the framework refuses by itself.
_SENTENCES = {
    400: f"the body cannot be read as JSON; send one such as {_EXAMPLE}",
    404: "there is nothing at this address",
    405: "this address is not asked by this method",
}
_FILES = {"page.js": "text/javascript", "page.css": "text/css"}


class Refused(Exception):
    """What is asked for cannot be given: a status and a sentence."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


class Wanted(pydantic.BaseModel):
    """The body of a request."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    prompt: str
    seed: Annotated[int, pydantic.Field(ge=0, le=MOST_SEED)] | None = None


def create(artifact: Artifact, line: queue.Queue, *, characters: int, hosts: Collection[str]) -> fastapi.FastAPI:
    """Returns the application.

    Args:
      artifact: what draws.
      line: where requests wait for it.
      characters: that a prompt may have.
      hosts: names that requests must be addressed to, or none where all will do.
    """
    app = fastapi.FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(guard.Guard, hosts=hosts)
    _add_errors(app)
    about = {"name": artifact.name, "steps": artifact.steps, "size": artifact.size, "most_seed": MOST_SEED}
    page = pages.environment().get_template("serve.html").render(about)
    templates = importlib.resources.files("unclip_jax") / "templates"
    files = {name: (templates / name.replace("page", "serve")).read_text(encoding="utf-8") for name in _FILES}

    def submit(wanted: Wanted, *, keep: bool) -> queue.Ticket:
        prompt = artifact.read(wanted.prompt, characters=characters)
        seed = secrets.randbelow(MOST_SEED + 1) if wanted.seed is None else wanted.seed
        return line.submit(prompt, seed, keep=keep)

    def known(id: str) -> queue.Ticket:
        ticket = line.find(id)
        if ticket is None:
            minutes = int(queue.KEPT_SECONDS // 60)
            raise Refused(404, f"there is no such image; what was drawn is kept for {minutes} minutes at most")
        return ticket

    @app.get("/")
    def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.get("/page.{ending}")
    def page_file(ending: str) -> Response:
        name = f"page.{ending}"
        if name not in files:
            raise HTTPException(404)
        return Response(files[name], media_type=_FILES[name])

    @app.post("/api/images")
    def ask(wanted: Wanted) -> JSONResponse:
        ticket = submit(wanted, keep=True)
        return JSONResponse(line.view(ticket), 202, headers={"Location": f"/api/images/{ticket.id}"})

    @app.get("/api/images/{id}.png")
    def image(id: str) -> Response:
        ticket = known(id)
        if ticket.state != queue.DONE:
            raise Refused(409, f"this image is not there: its state is {ticket.state}")
        ticket.told = True
        return _png(ticket)

    @app.get("/api/images/{id}")
    def state(id: str) -> JSONResponse:
        ticket = known(id)
        view = line.view(ticket)
        ticket.told = ticket.told or view["state"] in _STATUS
        return JSONResponse(view)

    @app.delete("/api/images/{id}")
    def take_back(id: str) -> JSONResponse:
        ticket = known(id)
        if not line.cancel(ticket):
            raise Refused(409, f"it is too late to take this request back: its state is {ticket.state}")
        return state(id)

    @app.post("/api/draw")
    async def draw(wanted: Wanted, request: fastapi.Request) -> Response:
        ticket = await run_in_threadpool(submit, wanted, keep=False)
        finished = asyncio.wrap_future(ticket.finished)
        while not (await asyncio.wait([finished], timeout=_LOOK_SECONDS))[0]:
            if await request.is_disconnected():
                line.cancel(ticket)
                return Response(status_code=499)  # read by nobody
        if ticket.state != queue.DONE:
            return error(ticket.error, _STATUS[ticket.state])
        return _png(ticket)

    @app.get("/healthz")
    def health() -> JSONResponse:
        found = line.health()
        return JSONResponse(found, 200 if found["state"] == "ready" else 503)

    return app


def _png(ticket: queue.Ticket) -> Response:
    name = re.sub(r"[^a-z0-9]+", "-", ticket.prompt.lower()[:60]).strip("-") or "image"
    disposition = f'inline; filename="{name}-seed{ticket.seed}.png"'
    return Response(ticket.png, media_type="image/png", headers={"Content-Disposition": disposition})


def _add_errors(app: fastapi.FastAPI) -> None:
    """Has every refusal be one sentence of JSON."""

    @app.exception_handler(InputError)
    async def wrong(request: fastapi.Request, found: InputError) -> JSONResponse:
        return error(str(found), 422)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: fastapi.Request, found: RequestValidationError) -> JSONResponse:
        first = found.errors()[0]
        return error(_sentence(first), 400 if first["type"] == "json_invalid" else 422)

    @app.exception_handler(queue.Full)
    async def full(request: fastapi.Request, found: queue.Full) -> JSONResponse:
        sentence = f"too many requests wait already; try again in {found.seconds} s"
        return error(sentence, 429, {"Retry-After": str(found.seconds)})

    @app.exception_handler(queue.Closed)
    async def closed(request: fastapi.Request, found: queue.Closed) -> JSONResponse:
        return error("the server is stopping; ask again when it is back", 503, {"Connection": "close"})

    @app.exception_handler(Refused)
    async def refused(request: fastapi.Request, found: Refused) -> JSONResponse:
        return error(str(found), found.status)

    @app.exception_handler(HTTPException)
    async def other(request: fastapi.Request, found: HTTPException) -> JSONResponse:
        sentence = _SENTENCES.get(found.status_code, found.detail)
        return error(sentence, found.status_code, dict(found.headers or {}))

    @app.exception_handler(Exception)
    async def bug(request: fastapi.Request, found: Exception) -> JSONResponse:
        return error("the server met an error of its own; its log says more", 500)


def _sentence(found: dict[str, Any]) -> str:
    """Returns what is wrong with a body, from the first thing that pydantic minds."""
    kind, place = found["type"], [str(part) for part in found["loc"][1:]]
    if kind == "json_invalid":
        return f"the body is not JSON: {found['ctx']['error']} at character {found['loc'][1]}"
    if kind == "extra_forbidden":
        return f"there is no field {place[0][:40]!a}; {nearest(place[0][:40], Wanted.model_fields)}"
    if place == ["prompt"] and kind != "missing":
        return f"prompt must be text, and is {repr(found['input'])[:40]!a}"
    if place[:1] == ["seed"]:
        return f"seed must be a whole number from 0 to {MOST_SEED}, and is {ascii(found['input'])[:40]}"
    return f"the body must be a JSON object such as {_EXAMPLE}, with the header Content-Type: application/json"
