"""What every program does around its `main`: exit codes, one-sentence errors, and JAX's settings.

Exit codes: 0 done; 1 bad input (one sentence on stderr) or a bug (a traceback); 42 stopped by SIGTERM or SIGINT
after saving, run the same command again to go on.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from unclip_jax.errors import InputError

DONE, FAILED, REQUEUE = 0, 1, 42


def run(main: Callable[[Sequence[str]], int | None]) -> None:
    """Parses flags, runs `main(argv)` and exits with its status; InputError becomes one line on stderr."""
    try:
        app.run(main, flags_parser=_parse)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags; what a config file or an override gets wrong is the user's input, so it becomes one sentence."""
    try:
        remaining = flags.FLAGS(argv)
        for name in _config_flags():
            _ = flags.FLAGS[name].value  # a config flag reads its file here
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError, SyntaxError) as error:
        message = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise InputError(" ".join(message.split())) from error
    if len(remaining) > 1:
        raise InputError(f"unexpected argument {remaining[1]!r}; options are written --name=value")
    return remaining


def _config_flags() -> list[str]:
    return [name for name in flags.FLAGS if type(flags.FLAGS[name]).__name__ == "_ConfigFlag"]


def start_logging() -> None:
    """Sends this package's log to stderr from INFO on, and of the libraries beneath only warnings."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    log = logging.getLogger("unclip_jax")
    log.handlers = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False


def start_jax(*, compile_cache: str = "") -> None:
    """Sets JAX up for a program: compile cache, random numbers that no sharding changes, and the other hosts.

    Hosts join where the environment names their coordinator, JAX_COORDINATOR_ADDRESS; else this process is alone.
    JAX_NUM_PROCESSES and JAX_PROCESS_ID tell a host who it is where JAX cannot detect it.

    Args:
      compile_cache: directory of compiled programs, kept between runs; "" leaves the cache off.
    """
    import jax

    jax.config.update("jax_threefry_partitionable", True)
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.expanduser(compile_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if os.environ.get("JAX_COORDINATOR_ADDRESS"):
        # JAX finds out by itself on clusters that it knows; elsewhere the environment says it.
        count, index = (os.environ.get(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
        jax.distributed.initialize(
            num_processes=int(count) if count else None, process_id=int(index) if index else None
        )
