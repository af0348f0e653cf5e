"""Changes pictures by what unCLIP makes of them: the two-part latent (z_i, x_T).

    python -m unclip_jax.manipulate encode --models=runs/quickstart --image=a.png --out=encoded
    python -m unclip_jax.manipulate variations --models=… --image=a.png --eta=0.3,1 --samples=8 --out=varied
    python -m unclip_jax.manipulate interpolate --models=… --image=a.png --image=b.png --format=sheet,gif --out=blend
    python -m unclip_jax.manipulate textdiff --models=… --image=a.png --text="a small red star" --out=diff
    python -m unclip_jax.manipulate arithmetic --models=… --image=a.png --plus="a star" --minus="a ring" --out=sum
    python -m unclip_jax.manipulate inpaint --models=… --image=a.png --mask=hole.png --caption="a red star" --out=filled
    python -m unclip_jax.manipulate outpaint --models=… --image=a.png --left=50% --right=50% --caption=… --out=wide
    python -m unclip_jax.manipulate edit --models=… --image=a.png --edits=edits.jsonl --out=edited
    python -m unclip_jax.manipulate rerank --models=… --folder=images --caption="a red star" --keep=8 --out=best

docs/manipulations.md shows them. `--image` may be given several times; the first five cut each to its central square
and encode it by CLIP and by running DDIM backwards. Pictures carry what made them as text, seeds are in their names,
`manifest.json` lists the options. Stopped by SIGTERM or Ctrl-C (exit code 42) a command keeps what is written, and the
same command goes on; a folder that holds anything else is refused.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from unclip_jax import hosts, programs
from unclip_jax.errors import InputError, nearest
from unclip_jax.manipulation import commands, fillings, latents, motion
from unclip_jax.manipulation.session import Session
from unclip_jax.stopping import Polled, Stopped, Stopping

# Flags of most commands: those that results depend on, and those that they do not.
_SHARED = (
    "caption", "seed", "steps", "skip_noisiest", "guidance_scale", "threshold", "last", "details", "weights", "stages",
)  # fmt: skip
_APART = ("models", "image", "out", "format", "batch_size", "devices_per_image", "compile_cache")


@dataclasses.dataclass(frozen=True)
class Command:
    """What a word after the program's name does.

    Attributes:
      run: does it, and returns a sentence of what there is now.
      needs: flags that must be given beside _NEEDED.
      reads: flags that it reads beside `shared` and _APART; others are refused.
      shared: those of _SHARED that it reads.
      overrides: flags that it reads where they are given; otherwise what the parts' runs say holds.
    """

    run: Callable[[Session], str]
    needs: tuple[str, ...] = ("image",)
    reads: tuple[str, ...] = ()
    shared: tuple[str, ...] = _SHARED
    overrides: tuple[str, ...] = ()


def _filling(run: Callable[[Session], str], *reads: str, needs: tuple[str, ...] = ("image",)) -> Command:
    shared = ("caption", "seed", "last", "weights")
    return Command(run, needs, (*reads, *fillings.READS), shared, tuple(fillings.OVERRIDES))


COMMANDS: dict[str, Command] = {
    "encode": Command(commands.encode),
    "variations": Command(commands.variations, reads=("eta", "samples")),
    "interpolate": Command(commands.interpolate, reads=("frames", "noise", "draws", "fps")),
    "textdiff": Command(
        commands.textdiff, needs=("image", "text"), reads=("text", "baseline", "theta", "frames", "fps")
    ),
    "arithmetic": Command(commands.arithmetic, reads=("plus", "minus", "plus_image", "minus_image", "strength")),
    "inpaint": _filling(fillings.inpaint, "mask", "box"),
    "outpaint": _filling(fillings.outpaint, "left", "top", "right", "bottom", "overlap"),
    "edit": _filling(fillings.edit, "edits", "fps", needs=("image", "edits")),
    "rerank": Command(fillings.rerank, needs=("caption",), reads=("folder", "keep"), shared=("caption",)),
}
_NEEDED = ("models", "out")


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("models", None, "Folder with the workdirs of the trained parts, such as runs/quickstart.")
    flags.DEFINE_multi_string("image", [], "Picture (JPEG, PNG or WebP); may be given several times.")
    flags.DEFINE_multi_string("caption", [], "What the decoder reads beside: one for each picture, or one for all.")
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_integer("seed", 0, "Seed of the first sample.", 0, 2**31 - 1)
    flags.DEFINE_string("steps", "250", "Steps of encoding and drawing, of the decoder and of each upsampler.")
    flags.DEFINE_integer("skip_noisiest", 1, "How many of them, from the noisiest, are left out.", lower_bound=0)
    flags.DEFINE_float("guidance_scale", 1.0, "Guidance of the decoder; 1 is none.")
    flags.DEFINE_string("threshold", "none", "What drawing does with pixels out of range: static, dynamic or none.")
    flags.DEFINE_string("last", None, "Part to draw up to: decoder, upsampler_1 …; by default all.")
    flags.DEFINE_enum("details", "kept", latents.DETAILS, "Upsamplers start from the picture's own x_T, or draw anew.")
    flags.DEFINE_enum("weights", "ema", ["ema", "params"], "The moving average of the weights, or the last ones.")
    flags.DEFINE_enum("stages", "last", ["last", "all"], "Write the last part's images only, or every part's.")
    flags.DEFINE_list("format", ["sheet"], "What shows all images at once: sheet, gif, mp4, or several.")
    flags.DEFINE_float("fps", 12.0, "Frames per second of a GIF or MP4.", 0.1, 100)
    flags.DEFINE_integer("batch_size", 16, "Images made at once.", lower_bound=1)
    flags.DEFINE_integer("devices_per_image", 1, "Devices that share an image that one cannot hold.", lower_bound=1)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")
    commands.define_flags()
    fillings.define_flags()


def check_flags(name: str, command: Command, options: Any) -> None:
    """Refuses a command without a flag that it needs, and with one that it does not read.

    Raises:
      InputError: the first such flag.
    """
    for flag in (*_NEEDED, *command.needs):
        if not options[flag].value:
            raise InputError(f"--{flag} is missing; {name} needs --{', --'.join((*_NEEDED, *command.needs))}")
    known = {*command.shared, *_APART, *command.reads, *command.overrides}
    mine = {flag for other in COMMANDS.values() for flag in (*other.reads, *other.shared)}
    for flag in sorted(mine - known):
        if options[flag].present:
            raise InputError(f"{name} does not read --{flag}; {nearest(flag, command.reads or command.shared)}")
    motion.check_formats(options.format)


def run(name: str, options: Any, stop: Polled) -> int:
    """Runs a command with the flags `options`; returns an exit code."""
    command = COMMANDS[name]
    given = {flag: options[flag].value for flag in (*command.shared, *command.reads)}
    try:
        print(command.run(Session(name, options, given, stop)), flush=True)
    except Stopped:
        print("stopped; the same command goes on", flush=True)
        return programs.REQUEUE
    return programs.DONE


def main(argv: Sequence[str]) -> int:
    options = flags.FLAGS
    if len(argv) < 2:
        raise InputError(f"a command is missing, the first word: one of {', '.join(COMMANDS)}")
    name = argv[1]
    check_flags(name, COMMANDS[name], options)
    programs.start_logging()
    stop = Stopping()  # files are written whole, so that nothing is lost wherever it ends
    programs.start_jax(compile_cache=options.compile_cache)
    if hosts.count() > 1:
        raise InputError("pictures are changed by one process; set UNCLIP_HOSTS=one, and give each host its own")
    return run(name, options, stop)


if __name__ == "__main__":
    define_flags()
    programs.run(main, commands=tuple(COMMANDS))
