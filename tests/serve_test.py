"""The server as a process: under more requests than it takes, at its end, and with what it must refuse."""

import collections
import http.client
import io
import json
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import served
from PIL import Image

from unclip_jax import provenance, serve
from unclip_jax.errors import InputError
from unclip_jax.serving.artifact import Artifact


def opened(content):
    """Pixels and texts of a PNG."""
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture), picture.text


def at_once(server, asked):
    """Sends all of these requests at the same time; returns (status, headers, content) of each."""
    answers = [None] * len(asked)
    barrier = threading.Barrier(len(asked))

    def client(number, prompt, seed):
        connection = http.client.HTTPConnection(server.address, timeout=served.PATIENCE)
        connection.connect()
        barrier.wait(served.PATIENCE)
        body = json.dumps({"prompt": prompt, "seed": seed})
        connection.request("POST", "/api/draw", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answers[number] = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()

    threads = [threading.Thread(target=client, args=(number, *one)) for number, one in enumerate(asked)]
    for thread in threads:
        thread.start()
    return answers, threads


def joined(threads):
    for thread in threads:
        thread.join(served.PATIENCE)
        assert not thread.is_alive()


def test_two_hundred_at_once_and_the_end(small_export, compile_cache, tmp_path):
    """Each gets its own image or is refused; then, in the midst of forty more, the server is told to stop."""
    asked = [(f"a {('red', 'blue', 'green')[n % 3]} star, number {n}", n % 7) for n in range(200)]
    options = ("--batch=4", "--queue=16", f"--compile_cache={compile_cache}")
    with served.running(small_export, tmp_path, *options) as server:
        server.ready()
        answers, threads = at_once(server, asked)
        joined(threads)
        assert None not in answers  # none was dropped
        statuses = collections.Counter(answer[0] for answer in answers)
        assert set(statuses) == {200, 429} and statuses[200] >= 16
        for status, headers, content in answers:
            if status == 429:
                seconds = int(headers["retry-after"])
                assert seconds >= 1
                assert json.loads(content) == {"error": f"too many requests wait already; try again in {seconds} s"}
        health = server.health()
        assert health["drawn"] == statuses[200] and health["failed"] == health["waiting"] == 0
        assert "drew 4 in" in server.log.read_text()  # several went into one call

        drawn = [number for number, answer in enumerate(answers) if answer[0] == 200]
        wanted = served.directly(small_export, compile_cache, [asked[number] for number in drawn], tmp_path)
        wanted = wanted.astype(np.int32)
        for row, number in enumerate(drawn):
            pixels, text = opened(answers[number][2])
            assert (text["prompt"], text["seed"]) == (asked[number][0], str(asked[number][1]))
            apart = np.abs(wanted - pixels)
            # Four at once are rounded otherwise than one alone.
            assert apart[row].max() <= 1 and np.delete(apart, row, 0).mean((1, 2, 3)).min() > 5

        more = [(f"a ring, number {n}", n) for n in range(40)]
        answers, threads = at_once(server, more)
        while server.health()["waiting"] < 4:
            time.sleep(0.005)
        ticket = json.loads(server.ask("POST", "/api/images", {"prompt": "the last", "seed": 1})[2])
        began = time.monotonic()
        server.process.terminate()
        if "id" in ticket:  # if there was a place for it
            found = {"state": "waiting"}
            while found["state"] in ("waiting", "drawing"):
                found = json.loads(server.ask("GET", f"/api/images/{ticket['id']}")[2])
            assert found["state"] == "done" or "the server is stopping" in found["error"]
            if found["state"] == "done":
                assert server.ask("GET", f"/api/images/{ticket['id']}.png")[0] == 200
        joined(threads)
        assert server.process.wait(served.PATIENCE) == 0 and time.monotonic() - began < 60
        statuses = collections.Counter(answer[0] for answer in answers)
        assert set(statuses) <= {200, 429, 503} and statuses[200] and statuses[503]
        for (prompt, seed), (status, _, content) in zip(more, answers, strict=True):
            if status == 200:
                assert (opened(content)[1]["prompt"], opened(content)[1]["seed"]) == (prompt, str(seed))
            elif status == 503:
                assert json.loads(content) == {"error": "the server is stopping; ask again when it is back"}
        assert "Traceback" not in server.log.read_text()


def test_what_it_says_to_programs(small_export, compile_cache, tmp_path):
    json_type = {"Content-Type": "application/json"}
    with served.running(small_export, tmp_path, "--prompt_length=60", f"--compile_cache={compile_cache}") as server:
        # One request from its beginning to its end, while the server may still be getting ready.
        status, headers, content = server.ask("POST", "/api/images", {"prompt": "  a\tred  star\u200b ", "seed": 5})
        ticket = json.loads(content)
        assert status == 202 and headers["location"] == f"/api/images/{ticket['id']}"
        assert (ticket["prompt"], ticket["seed"], ticket["state"]) == ("a red star", 5, "waiting")
        deadline = time.monotonic() + served.PATIENCE
        while (found := json.loads(server.ask("GET", headers["location"])[2]))["state"] != "done":
            assert found["state"] in ("waiting", "drawing") and time.monotonic() < deadline
            time.sleep(0.05)
        status, headers, first = server.ask("GET", f"/api/images/{ticket['id']}.png")
        assert status == 200 and headers["content-type"] == "image/png"
        assert headers["content-disposition"] == 'inline; filename="a-red-star-seed5.png"'
        # Alone it is what the export itself draws, to the bit, and so is what is waited for.
        [wanted] = served.directly(small_export, compile_cache, [("a red star", 5)], tmp_path)
        pixels, text = opened(first)
        np.testing.assert_array_equal(pixels, wanted)
        assert pixels.std() > 5 and provenance.SOURCE_TYPE in text["XML:com.adobe.xmp"]
        assert server.ask("POST", "/api/draw", {"prompt": "a red star", "seed": 5})[2] == first
        seeds = {opened(server.ask("POST", "/api/draw", {"prompt": "a star"})[2])[1]["seed"] for _ in range(2)}
        assert len(seeds) == 2  # a new one each time

        refusals = [
            ({"prompt": ""}, 422, "the prompt is empty"),
            ({"prompt": " \n\u200b"}, 422, "the prompt is empty"),
            (b'{"prompt": "\\ud800"}', 422, "the prompt is empty"),
            ({"prompt": "x" * 61}, 422, "has 61 characters; this server takes 60 at most"),
            ({"prompt": "1 2 3 4 5 6 7 8 9 " * 3}, 422, "this model reads 22 tokens"),
            ({"prompt": 7}, 422, "prompt must be text, and is '7'"),
            ({"seed": 7}, 422, "the body must be a JSON object such as"),
            ({"prompt": "a", "seed": -1}, 422, "a whole number from 0 to 2147483647, and is -1"),
            ({"prompt": "a", "seed": 2**31}, 422, "and is 2147483648"),
            ({"prompt": "a", "seed": 1.5}, 422, "and is 1.5"),
            ({"prompt": "a", "seed": "1"}, 422, "and is '1'"),
            ({"prompt": "a", "seed": True}, 422, "and is True"),
            (b'{"prompt": "a", "seed": NaN}', 422, "and is nan"),
            ({"prompt": "a", "sed": 1}, 422, "there is no field 'sed'; did you mean 'seed'?"),
            ([], 422, "the body must be a JSON object"),
            (b"", 422, "the body must be a JSON object"),
            (b'{"prompt": "a"', 400, "the body is not JSON: Expecting ',' delimiter at character 14"),
            (b"[" * 9000, 400, "the body cannot be read as JSON"),
            (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "the body cannot be read as JSON"),
            (b"\xff", 400, "the body cannot be read as JSON"),
            (b'{"prompt": "' + b"x" * 20000 + b'"}', 413, "the request is too large"),
        ]
        for path in ("/api/images", "/api/draw"):
            for body, wanted_status, says in refusals:
                status, headers, content = server.ask("POST", path, body, json_type)
                assert (status, list(json.loads(content))) == (wanted_status, ["error"]), (body, content)
                assert says in json.loads(content)["error"] and "\n" not in json.loads(content)["error"]
        # A page from elsewhere can send text without asking first, but not as JSON; and nobody tells it that it may.
        assert server.ask("POST", "/api/draw", b'{"prompt": "a"}', {"Content-Type": "text/plain"})[0] == 422
        status, headers, _ = server.ask("OPTIONS", "/api/draw", None, {"Origin": "http://elsewhere.example"})
        assert status == 405 and not any(name.startswith("access-control") for name in headers)
        # Nor by a name of its own that it gives this machine's address.
        port = server.address.rpartition(":")[2]
        for host in ("elsewhere.example", f"elsewhere.example:{port}", "127.0.0.1.elsewhere.example", "", "[::1"):
            status, _, content = server.ask("GET", "/", None, {"Host": host})
            assert status == 400 and (not host or "elsewhere" not in host or "--allowed_hosts" in content.decode())
        for host in (f"localhost:{port}", "LOCALHOST", "127.0.0.1", f"[::1]:{port}"):
            assert server.ask("GET", "/healthz", None, {"Host": host})[0] == 200
        for method, path, wanted_status in (
            ("GET", "/nothing", 404), ("GET", "/page.py", 404), ("GET", "/api/images/nothing", 404),
            ("GET", "/api/images/nothing.png", 404), ("GET", "/../setup.py", 404), ("DELETE", "/api/images/x", 404),
            ("PUT", "/api/draw", 405), ("DELETE", f"/api/images/{ticket['id']}", 409),
        ):  # fmt: skip
            status, headers, content = server.ask(method, path)
            assert status == wanted_status and json.loads(content)["error"], (method, path, content)
            assert "default-src 'none'" in headers["content-security-policy"]
        # A request is whole or it is none: half of one, and the client is gone.
        for length in (100, 10):
            with socket.create_connection(server.address.split(":"), timeout=10) as half:
                head = f"POST /api/draw HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
                half.sendall(head.encode() + b'{"prompt":')
        assert server.health()["state"] == "ready" and server.health()["failed"] == 0
        assert server.end() == 0 and "Traceback" not in server.log.read_text()


def test_an_export_that_is_not_what_it_says_is_not_served(small_export, tmp_path):
    for name, content, says in (
        ("decoder.sample.stablehlo", b"other code", "decoder.sample.stablehlo was altered"),
        ("bpe.py", b"import os", "bpe.py was altered"),
        ("manifest.json", b"{}", "is no export"),
        ("decoder.safetensors", None, "is not whole"),
    ):
        copy = tmp_path / f"without {name}"
        shutil.copytree(small_export, copy)
        (copy / name).unlink()
        if content is not None:
            (copy / name).write_bytes(content)
        with pytest.raises(InputError, match=says):
            Artifact(str(copy))
    for change, says in (
        ({"expires": "2020-01-01T00:00:00+00:00"}, "expired on 2020-01-01.*--re_export"),
        ({"format": "safetensors"}, "is an export as safetensors, which no server draws from"),
        ({"chain": []}, "has no decoder, so it draws nothing"),
    ):
        copy = tmp_path / next(iter(change))
        shutil.copytree(small_export, copy)
        served.rewrite(copy / "manifest.json", change)
        with pytest.raises(InputError, match=says):
            Artifact(str(copy))
    with pytest.raises(InputError, match="is no export"):
        Artifact(str(tmp_path))


def test_where_it_listens_and_by_which_names_it_is_asked():
    local = {"localhost", "127.0.0.1", "::1"}
    assert serve.allowed_hosts("127.0.0.1", []) == serve.allowed_hosts("localhost", []) == local
    assert serve.allowed_hosts("::1", ["Draw.example.org "]) == {*local, "draw.example.org"}
    assert serve.allowed_hosts("127.0.0.2", []) == {*local, "127.0.0.2"}
    assert serve.allowed_hosts("0.0.0.0", []) == set()
    assert serve.allowed_hosts("10.1.2.3", ["draw.example.org"]) == {"draw.example.org"}
    with serve.listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        with pytest.raises(InputError, match=f"--host=127.0.0.1 --port={port} cannot be listened on"):
            serve.listen("127.0.0.1", port)
