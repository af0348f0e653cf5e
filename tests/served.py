"""A server in a process of its own, and what is asked of it."""

import contextlib
import hashlib
import http.client
import json
import pathlib
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Everything is waited for, and nothing for longer.
PATIENCE = 120.0

# Draws with what lies in an export, one image at a time, in an interpreter that knows nothing of this package's folder.
DIRECT = """
import json, pathlib, sys
import jax, numpy as np
folder, cache, out = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
sys.path.insert(0, folder)
folder = pathlib.Path(folder)
import bpe, run, tensors
manifest = run.verified(folder)
loaded, encode, images = run.load(folder, manifest, tensors.read), bpe.Encoder(folder), []
for prompt, seed in json.load(sys.stdin):
    *_, (_, image) = run.draw(manifest, *loaded, encode, [prompt], [seed])
    images.append(image[0])
np.save(out, np.stack(images))
"""


def directly(export: pathlib.Path, cache: str, asked: list[tuple[str, int]], folder: pathlib.Path) -> np.ndarray:
    """Returns what the export itself makes of prompts and seeds, uint8 [n, s, s, 3]."""
    command = [sys.executable, "-I", "-c", DIRECT, str(export), cache, str(folder / "direct.npy")]
    done = subprocess.run(command, input=json.dumps(asked), text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return np.load(folder / "direct.npy")


def rewrite(manifest: pathlib.Path, changes: dict[str, Any]) -> None:
    """Changes a manifest as someone does who mends its digest, too."""
    content = {**json.loads(manifest.read_text()), **changes}
    content.pop("digest")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    manifest.write_text(json.dumps({**content, "digest": digest}))


class Server:
    """A server's process.

    Attributes:
      url: where it is.
      log: path of what it writes to stderr.
    """

    def __init__(self, export: pathlib.Path, folder: pathlib.Path, *options: str):
        self.log = folder / "server.log"
        command = [sys.executable, "-m", "unclip_jax.serve", f"--artifact={export}", "--port=0", *options]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.log.read_text()
        self.address = urllib.parse.urlsplit(self.url).netloc

    def ready(self) -> None:
        """Waits until it draws."""
        deadline = time.monotonic() + PATIENCE
        while self.health()["state"] != "ready":
            assert time.monotonic() < deadline and self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)

    def health(self) -> Any:
        return json.loads(self.ask("GET", "/healthz")[2])

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers by their lower-case names, and content; a body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE)
        with contextlib.closing(connection):
            sent = {} if body is None else {"Content-Type": "application/json"}
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, body=content, headers={**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def end(self) -> int:
        """Sends SIGTERM and waits; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE)


@contextlib.contextmanager
def running(export: pathlib.Path, folder: pathlib.Path, *options: str) -> Iterator[Server]:
    """Yields a server, and makes sure that it is gone."""
    server = Server(export, folder, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()
        if server.process.stdout:
            server.process.stdout.close()
