"""Serves an export to those who want to try it: a page where a prompt becomes an image, and the same as JSON.

    pip install 'unclip_jax[serve]'
    python -m unclip_jax.serve --artifact=exports/shapes
    curl --json '{"prompt": "a small red star", "seed": 3}' http://127.0.0.1:8000/api/draw --output star.png

`--artifact` is what `python -m unclip_jax.export --format=stablehlo` wrote. All its hashes are checked before anything
is loaded, and one that has expired is refused. A prompt and a seed make the image that the export's own `run.py` makes
of them; drawn with others (`--batch`), it may be rounded otherwise.

It listens on this machine alone unless `--host` says otherwise; it has no accounts and no encryption, so before others
are let in, something that has both belongs in front of it. Requests wait in a queue of `--queue` places, beyond which
they are refused with status 429. SIGTERM and Ctrl-C end it: those who wait are told, what is being drawn is finished
and handed out, for `--grace` seconds at most. The exit code is 0 then; a second signal ends it at once.
"""

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Collection, Generator, Sequence
from typing import TYPE_CHECKING

from absl import flags

from unclip_jax import hosts, programs
from unclip_jax.data import captions
from unclip_jax.errors import InputError

if TYPE_CHECKING:
    import fastapi

    from unclip_jax.serving.queue import Queue

_LOG = logging.getLogger("unclip_jax.serve")  # __name__ is "__main__" where this is the program
# How long one who polls has, at the end, to fetch what is there for him.
_FETCH_SECONDS = 3.0


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("artifact", None, "Folder that `unclip_jax.export --format=stablehlo` wrote.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 is all of this machine.")
    flags.DEFINE_integer("port", 8000, "Port to listen on; 0 is any that is free.", 0, 65535)
    flags.DEFINE_list("allowed_hosts", [], "Further names that the server may be asked by, such as draw.example.org.")
    flags.DEFINE_integer("batch", 1, "Images drawn in one call where so many wait, else one.", lower_bound=1)
    flags.DEFINE_integer("queue", 64, "Requests that may wait.", lower_bound=1)
    flags.DEFINE_integer("prompt_length", 500, "Characters that a prompt may have.", 1, captions.MAX_CHARACTERS)
    flags.DEFINE_float("grace", 25.0, "Seconds that a stop waits for the images being drawn.", lower_bound=0.0)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def allowed_hosts(host: str, further: Sequence[str]) -> Collection[str]:
    """Returns the names that requests must be addressed to; none where all will do.

    On a loopback address that is checked always. Elsewhere the names are known only where they are given.

    Args:
      host: what the server listens on.
      further: names that were given.
    """
    from unclip_jax.serving import guard

    names = {name.strip().lower().strip("[]") for name in further if name.strip()}
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may be any address
        local = False
    return names | guard.LOOPBACK | {host} if local else names


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound.

    Raises:
      InputError: there is no such address here, or the port is taken.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        raise InputError(f"--host={host} --port={port} cannot be listened on ({error}); use another") from error


async def serve(app: "fastapi.FastAPI", line: "Queue", bound: socket.socket, *, grace: float) -> None:
    """Serves until a signal comes, and then until nobody is left who waits for an answer.

    Args:
      app: from `serving.app.create`.
      line: the queue that it puts requests into; started here, while the page can be seen already.
      bound: from `listen`.
      grace: seconds that the end waits for the images being drawn.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Generator[None, None, None]:
            yield  # they are heard below

    settings = uvicorn.Config(
        app, http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=5,
    )  # fmt: skip
    server, stop = Server(settings), asyncio.Event()

    def asked(name: str) -> None:
        if stop.is_set():
            hosts.leave(programs.DONE)
        _LOG.info("stopping: %s", name)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, asked, number.name)
    serving = asyncio.create_task(server.serve([bound]))
    starting = asyncio.create_task(asyncio.to_thread(line.start))
    ends = {serving, asyncio.create_task(stop.wait())}
    await asyncio.wait({*ends, starting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done():
        starting.result()
        _LOG.info("ready")
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    line.close()
    if not await asyncio.to_thread(line.idle, grace):
        _LOG.warning("images were still being drawn after %g s", grace)
        line.abandon()
    deadline = time.monotonic() + _FETCH_SECONDS
    while line.untold() and time.monotonic() < deadline and not serving.done():
        await asyncio.sleep(0.05)
    server.should_exit = True
    await serving


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    if not options.artifact:
        raise InputError("--artifact is missing; for example --artifact=exports/shapes")
    try:
        from unclip_jax.serving import app as app_lib
        from unclip_jax.serving import artifact as artifact_lib
        from unclip_jax.serving import queue
    except ModuleNotFoundError as error:
        raise InputError(f"the server needs {error.name}; pip install 'unclip_jax[serve]'") from error
    for number in (signal.SIGINT, signal.SIGTERM):  # while nobody can be waiting for an answer
        signal.signal(number, lambda *_: hosts.leave(programs.DONE))
    programs.start_logging()
    programs.start_jax(compile_cache=options.compile_cache)
    if hosts.count() > 1:
        raise InputError("an export is served by one process; set UNCLIP_HOSTS=one")
    names = allowed_hosts(options.host, options.allowed_hosts)
    bound = listen(options.host, options.port)
    artifact = artifact_lib.Artifact(options.artifact)
    line = queue.Queue(artifact, batch=options.batch, places=options.queue)
    app = app_lib.create(artifact, line, characters=options.prompt_length, hosts=names)
    host, port = bound.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if not names:
        _LOG.warning("the server answers to any name; --allowed_hosts=NAME keeps pages from elsewhere from using it")
    # Neither asyncio.run nor Python's own end: they wait for threads, of which one may be compiling for minutes.
    asyncio.new_event_loop().run_until_complete(serve(app, line, bound, grace=options.grace))
    hosts.leave(programs.DONE)


if __name__ == "__main__":
    define_flags()
    programs.run(main)
