"""What every program does around its `main`: exit codes, one-sentence errors, and JAX's settings.

Exit codes: 0 done; 1 bad input (one sentence on stderr), a bug (a traceback), a hang or the failure of another host;
42 stopped by SIGTERM or SIGINT after saving, run the same command again to go on. On several hosts also 134, by JAX:
another process died without a word; run the same command again.
"""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from unclip_jax import hosts
from unclip_jax.errors import InputError, nearest

DONE, FAILED, REQUEUE = 0, 1, 42


def run(main: Callable[[Sequence[str]], int | None], *, commands: Sequence[str] = ()) -> None:
    """Parses flags, runs `main(argv)` and exits with its status; InputError becomes one line on stderr.

    One of several hosts that fails ends all of them, and what it failed of stands in its run's folder.

    Args:
      main: gets the program's name and, where one was given, the command.
      commands: words of which one may be the first argument: `python -m unclip_jax.preferences apply --probe=…`.
    """
    try:
        app.run(main, flags_parser=functools.partial(_parse, commands=commands))
    except InputError as error:
        print(f"{_host()}error: {error}", file=sys.stderr)
        if hosts.count() > 1:
            hosts.fail(str(error))
        sys.exit(FAILED)
    except SystemExit as end:
        if hosts.count() > 1 and isinstance(end.code, int | None):
            hosts.leave(end.code or DONE)
        raise
    except Exception as error:
        if hosts.count() > 1:
            print(f"{_host()}{traceback.format_exc()}", file=sys.stderr)
            hosts.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
        hosts.write_failure(traceback.format_exc())
        raise


def _parse(argv: Sequence[str], *, commands: Sequence[str] = ()) -> list[str]:
    """Parses flags; what a config file or an override gets wrong is the user's input, so it becomes one sentence."""
    try:
        remaining = flags.FLAGS(argv)
        for name in _config_flags():
            _ = flags.FLAGS[name].value  # a config flag reads its file here
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError, SyntaxError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise InputError(" ".join(message.split())) from error
    if len(remaining) > 1 and commands and remaining[1] not in commands:
        raise InputError(f"there is no command {remaining[1]!r}; {nearest(remaining[1], commands)}")
    if len(remaining) > (2 if commands else 1):
        raise InputError(f"unexpected argument {remaining[-1]!r}; options are written --name=value")
    return remaining


def _config_flags() -> list[str]:
    return [name for name in flags.FLAGS if type(flags.FLAGS[name]).__name__ == "_ConfigFlag"]


def _host() -> str:
    return f"[{hosts.index()}] " if hosts.count() > 1 else ""


class _Lines(logging.Formatter):
    """On several hosts each line begins with its process's number."""

    def format(self, record: logging.LogRecord) -> str:
        return _host() + super().format(record)


def start_logging() -> None:
    """Sends this package's log to stderr from INFO on, and of the libraries beneath only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("unclip_jax")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def start_jax(*, compile_cache: str = "") -> None:
    """Sets JAX up for a program: compile cache, random numbers that no sharding changes, and the other hosts.

    Args:
      compile_cache: directory of compiled programs, kept between runs; "" leaves the cache off.

    Raises:
      InputError: see `hosts.join`.
    """
    import jax

    jax.config.update("jax_threefry_partitionable", True)
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.expanduser(compile_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    hosts.join()
