"""The processes of one run, one on each host: how they find each other, agree, and end together.

On one host all of this is silent and does nothing. Several hosts share a small key-value store, that of JAX's
coordination service, which process 0 runs; it costs the devices nothing and works while they compute.

Environment:
  UNCLIP_HOSTS: "auto" (default) joins the others where there is a sign of them; "one" leaves this process alone.
  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID: who they are, where JAX cannot find out by itself.
  UNCLIP_JOIN_SECONDS: how long to wait for all of them at the start (300).
  UNCLIP_HEARTBEAT_SECONDS: after how much silence a process counts as dead, which ends all others (30).
"""

import collections
import contextlib
import faulthandler
import glob
import json
import logging
import multiprocessing
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from etils import epath

from unclip_jax.errors import InputError, nearest

_LOG = logging.getLogger(__name__)
FAILURES = "failures"
# Whatever a process is told through the store it may be told days later.
_FOREVER_MS = 10**9
# How long a host that another one's failure ends has for its own words, and process 0 for those it must outlive.
_LAST_WORDS_SECONDS = 3.0
_FAILED = "failed"


class _Here:
    """What this process knows of its run."""

    count, index = 1, 0
    client: Any = None  # of the key-value store, None on one host
    workdir: epath.Path | None = None
    leaving = threading.Event()
    waiting: list[Callable[[], None]] = []
    last_words: list[Callable[[int], None]] = []
    asked: collections.Counter[str] = collections.Counter()  # how often a question was put, so that each is new


_HERE = _Here()


def count() -> int:
    """Number of processes of this run."""
    return _HERE.count


def index() -> int:
    """Number of this process, from 0."""
    return _HERE.index


def join() -> None:
    """Joins the other processes of this run, where there is a sign of any.

    Must come before anything asks JAX for devices. Signs are JAX_COORDINATOR_ADDRESS, SLURM, Open MPI, or a TPU whose
    machine knows of others.

    Raises:
      InputError: the environment contradicts itself. Where the others do not come in time, the process ends with 1.
    """
    how = os.environ.get("UNCLIP_HOSTS", "auto")
    if how not in ("auto", "one"):
        raise InputError(f"UNCLIP_HOSTS={how!r} is unknown; {nearest(how, ('auto', 'one'))}")
    certain = _is_one_of_several()
    if _HERE.client or how == "one" or not (certain or _on_tpu()):
        return
    import jax

    processes, number = _number("JAX_NUM_PROCESSES"), _number("JAX_PROCESS_ID")
    seconds = _number("UNCLIP_JOIN_SECONDS") or 300
    # JAX's own service for SIGTERM swallows the signal where nobody asks it; `stopping` takes its place.
    jax.config.update("jax_enable_preemption_service", False)
    late = threading.Timer(seconds, _give_up, (seconds, number))
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            num_processes=processes,
            process_id=number,
            initialization_timeout=seconds + 60,  # JAX's way to say it is to abort
            heartbeat_timeout_seconds=_number("UNCLIP_HEARTBEAT_SECONDS") or 30,
        )
    except (ValueError, OSError, RuntimeError) as error:
        if certain and isinstance(error, ValueError):
            raise InputError(
                f"this is one of several processes, but not which ({error}); set JAX_COORDINATOR_ADDRESS=HOST:PORT, "
                "JAX_NUM_PROCESSES and JAX_PROCESS_ID, or UNCLIP_HOSTS=one"
            ) from error
        if certain or (isinstance(error, RuntimeError) and "metadata" not in str(error)):
            raise
        _LOG.debug("this TPU's machine does not tell of others: %s", error)
        return
    finally:
        late.cancel()
    from jax._src import distributed  # the store has no public name; here is the only place that needs it

    state = distributed.global_state
    if state.num_processes > 1:
        _HERE.count, _HERE.index, _HERE.client = state.num_processes, state.process_id, state.client
        watch(_FAILED, _end_with_the_others)
        for fn in _HERE.waiting:
            fn()


def _is_one_of_several() -> bool:
    if os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    slurm = "SLURM_PROCID" in os.environ and (_number("SLURM_NTASKS") or 1) > 1
    return slurm or (_number("OMPI_COMM_WORLD_SIZE") or 1) > 1


def _on_tpu() -> bool:
    """Whether this may be a TPU machine: only its metadata, which JAX reads, knows whether it is one of several."""
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def _number(name: str) -> int | None:
    text = os.environ.get(name, "")
    if text and not text.isdigit():
        raise InputError(f"{name}={text!r} is no number")
    return int(text) if text else None


def _give_up(seconds: int, number: int | None) -> None:
    """Ends this process, which waits inside of JAX for others that do not come."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    if number and address and not _reaches(address):
        said = f"process {number} could not reach process 0 at {address} within {seconds} s; is it running, and the "
        said += "port open?"
    else:
        of = os.environ.get("JAX_NUM_PROCESSES", "the other")
        said = f"not all of {of} processes came together{f' at {address}' if address else ''} within {seconds} s; "
        said += "start all, with one JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and see that the port is open"
    print(f"error: {said}", file=sys.stderr, flush=True)
    os._exit(1)


def _reaches(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except (OSError, ValueError):
        return False
    return True


def when_joined(fn: Callable[[], None]) -> None:
    """Calls `fn` once this process is one of several: now, or when it has joined them; on one host never."""
    if _HERE.client:
        fn()
    else:
        _HERE.waiting.append(fn)


def tell(key: str, value: str) -> None:
    """Puts a value into the store for good; who comes second with the same key is not heard."""
    import jax

    try:
        _HERE.client.key_value_set(f"unclip/{key}", value)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise


def hear(key: str) -> str:
    """Waits for somebody to tell the value of a key."""
    return _HERE.client.blocking_key_value_get(f"unclip/{key}", _FOREVER_MS)


def watch(key: str, fn: Callable[[str], None]) -> None:
    """Calls `fn(value)` in a thread of its own as soon as somebody tells the value of a key."""
    import jax

    def wait() -> None:
        try:
            value = hear(key)
        except jax.errors.JaxRuntimeError:  # process 0 is gone, and JAX ends this process, too
            return
        fn(value)

    threading.Thread(target=wait, name=f"watch {key}", daemon=True).start()


def from_first(name: str, make: Callable[[], Any]) -> Any:
    """Returns what `make` returns on process 0, as JSON has it, on all hosts; they must ask in the same order."""
    if _HERE.count == 1:
        return json.loads(json.dumps(make()))
    question = _question(f"first/{name}")
    if _HERE.index == 0:
        tell(question, json.dumps(make()))
    return json.loads(hear(question))


def gather(name: str, value: Any) -> list[Any]:
    """Returns what every host says to one question, as JSON has it; they must ask in the same order."""
    if _HERE.count == 1:
        return [json.loads(json.dumps(value))]
    question = _question(f"gather/{name}")
    tell(f"{question}/{_HERE.index}", json.dumps(value))
    if _HERE.index == 0:  # one collects, for the others are many
        tell(question, f"[{','.join(hear(f'{question}/{host}') for host in range(_HERE.count))}]")
    return json.loads(hear(question))


def together(name: str, fn: Callable[[], Any]) -> Any:
    """Returns fn(); raises on all hosts if it raises on any, so that none waits for one that is elsewhere."""
    failed: Exception | None = None
    try:
        value = fn()
    except Exception as error:
        failed = error
    said = gather(name, "" if failed is None else f"{type(failed).__name__}: {str(failed)[:300]}")
    if failed is not None:
        raise failed
    for host, words in enumerate(said):
        if words:
            raise RuntimeError(f"process {host}: {words}")
    return value


def one_first(name: str, fn: Callable[[], Any]) -> Any:
    """Returns fn(), which process 0 calls before all others: what it writes, they find, or write on their own disk."""
    if _HERE.index == 0:
        value = fn()
        from_first(name, lambda: None)
        return value
    from_first(name, lambda: None)
    return fn()


def check_same(name: str, values: Mapping[str, Any]) -> None:
    """Compares with process 0's what must be the same on all hosts.

    Raises:
      InputError: it differs; the keys are named.
    """
    theirs = from_first(name, lambda: dict(values))
    mine = json.loads(json.dumps(dict(values)))
    differing = sorted(key for key in mine | theirs if mine.get(key) != theirs.get(key))
    if differing:
        named = "; ".join(f"{key} is {theirs.get(key)!r} there and {mine.get(key)!r} here" for key in differing)
        raise InputError(f"process {_HERE.index} has another {name} than process 0 ({named}); start all alike")


def _question(name: str) -> str:
    _HERE.asked[name] += 1
    return f"{name}/{_HERE.asked[name]}"


def failures_belong_to(workdir: epath.PathLike) -> None:
    """Says in which run's folder a failure is written down."""
    _HERE.workdir = epath.Path(workdir)


def write_failure(text: str) -> None:
    """Writes what ended this process to `failures/<process>.txt` of its run, after what stood there."""
    if _HERE.workdir is None or not _HERE.workdir.exists():
        return
    with contextlib.suppress(OSError):  # nobody else can be told
        folder = _HERE.workdir / FAILURES
        folder.mkdir(exist_ok=True)
        path = folder / f"{_HERE.index}.txt"
        before = path.read_text() if path.exists() else ""
        path.write_text(f"{before}{time.strftime('%Y-%m-%d %H:%M:%S')} process {_HERE.index}\n{text.rstrip()}\n\n")


def stacks() -> str:
    """Returns where each thread of this process is, the newest call first."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")


def fail(sentence: str, details: str = "") -> NoReturn:
    """Ends this process with 1 after writing `sentence` and `details` down; other hosts are told and end as well."""
    write_failure(f"{sentence}\n{details}")
    if _HERE.count > 1 and not _HERE.leaving.is_set():
        with contextlib.suppress(Exception):  # process 0 may be what failed
            tell(_FAILED, f"process {_HERE.index}: {sentence}")
        time.sleep(_LAST_WORDS_SECONDS)  # or those who wait for this one would end by that
    leave(1)


def _end_with_the_others(what: str) -> None:
    """Ends this process, because another one failed."""
    time.sleep(_LAST_WORDS_SECONDS / 2)  # all may have failed alike, and say so
    if _HERE.leaving.is_set() or what.startswith(f"process {_HERE.index}:"):
        return
    text = f"ended, because another process failed. {what}"
    here = stacks()
    print(f"[{_HERE.index}] {text}\n{here}", file=sys.stderr, flush=True)
    write_failure(f"{text}\n{here}")
    leave(1)


def before_leaving(words: Callable[[int], None]) -> None:
    """Has `words(status)` called where this process ends at once; it must be short, and may come from any thread."""
    _HERE.last_words.append(words)


def leave(status: int) -> NoReturn:
    """Ends this process at once, by any of its threads; process 0 outlives the others, whom its end would abort."""
    if _HERE.leaving.is_set():  # another thread is at it
        time.sleep(600)
    _HERE.leaving.set()
    for words in _HERE.last_words:
        with contextlib.suppress(Exception):
            words(status)
    for child in multiprocessing.active_children():
        child.terminate()
    # Not by way of Python's end: threads that wait for the store would abort it.
    with contextlib.suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        if _HERE.count > 1:
            tell(f"left/{_HERE.index}", "")
            if _HERE.index == 0:
                _outlive(5.0 if status == 1 else 60.0)
    os._exit(status)


def _outlive(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for other in range(1, _HERE.count):
        left = max(deadline - time.monotonic(), 0.01)
        _HERE.client.blocking_key_value_get(f"unclip/left/{other}", int(left * 1000))
    time.sleep(0.3)
