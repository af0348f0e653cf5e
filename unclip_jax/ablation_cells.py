"""The settings that the ablations compare: draws images of captions in each, and has the oracle read them.

    python -m unclip_jax.ablation_cells --workdir=runs/ablations --part=0 --parts=2

`python -m unclip_jax.ablations` trains the parts, writes the plan that this reads, and starts it. A cell is one setting
with one seed; its result is a file in `cells/`, named after all that it depends on, so that none is made twice.
"""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from jaxtyping import Float

from unclip_jax import checkpoint, metrics, programs, unclip
from unclip_jax import quickstart_results as results
from unclip_jax.ablation_tables import VERDICTS
from unclip_jax.data.scenes import parse_caption
from unclip_jax.errors import InputError
from unclip_jax.evaluation import oracle
from unclip_jax.stopping import Polled, Stopping

_LOG = logging.getLogger("unclip_jax.ablation_cells")  # __name__ is "__main__" where this is the program
PLAN, CELLS = "plan.json", "cells"
# What the decoder reads as z_i: nothing, z_t, a prior's draw, or the embedding of the caption's own picture.
EMBEDDINGS = ("dropped", "none", "ar", "diffusion", "true")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to make images of captions.

    Attributes:
      table, row: where its numbers go.
      decoder: folder of the decoder below the workdir.
      embedding: one of EMBEDDINGS.
      guidance_scale: of the decoder.
      method, timesteps: how the diffusion prior is sampled; "" where there is none.
      candidates: draws of the prior, of which the one nearest to z_t is kept, or the first where variances are
        compared; 0 is its config's.
    """

    table: str
    row: str
    decoder: str
    embedding: str
    guidance_scale: float
    method: str = ""
    timesteps: str = ""
    candidates: int = 0

    @property
    def prior(self) -> str:
        """The part that makes its embeddings, or ""."""
        return unclip.PRIORS.get(self.embedding) or ""

    @property
    def prior_sampling(self) -> dict[str, Any]:
        """What of the prior's sampling is not its config's."""
        chosen = {"method": self.method, "timesteps": self.timesteps, "candidates": self.candidates}
        return {key: value for key, value in chosen.items() if value}

    @property
    def cost(self) -> int:
        """Network calls for an image, in units of an unguided decoder's: guidance doubles them."""
        return 1 if self.guidance_scale == 1 else 2


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells.

    Attributes:
      directory: of the prepared data set.
      captions: how many captions of one object, the first of the validation split.
      seeds: of sampling.
      batch_size: images at once.
      settings: what is compared.
    """

    directory: str
    captions: int
    seeds: tuple[int, ...]
    batch_size: int
    settings: tuple[Setting, ...]

    def write(self, workdir: pathlib.Path) -> None:
        """Writes plan.json."""
        (workdir / PLAN).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, workdir: pathlib.Path) -> "Plan":
        """Reads plan.json.

        Raises:
          InputError: it is not there.
        """
        if not (workdir / PLAN).exists():
            raise InputError(f"{workdir} has no {PLAN}; python -m unclip_jax.ablations --workdir={workdir} makes it")
        value = json.loads((workdir / PLAN).read_text())
        settings = tuple(Setting(**setting) for setting in value.pop("settings"))
        return cls(**{**value, "seeds": tuple(value["seeds"]), "settings": settings})

    def part(self, number: int, parts: int) -> list[Setting]:
        """Returns the settings of one of several processes: about equal costs, and few decoders in each to compile."""
        ordered = sorted(self.settings, key=lambda s: (s.decoder, s.embedding == "dropped", s.guidance_scale))
        ends = np.cumsum([setting.cost for setting in ordered])
        middles = ends - np.array([setting.cost for setting in ordered]) / 2
        return [s for s, middle in zip(ordered, middles, strict=True) if int(parts * middle / ends[-1]) == number]


def pictures(plan: Plan) -> list[results.Render]:
    """Returns the captions of one object with their real pictures.

    Raises:
      InputError: there are fewer than the plan asks for.
    """
    items = results.renders(plan.directory, "validation", count=10**9)
    single = [item for item in items if len(parse_caption(item.caption).kinds) == 1][: plan.captions]
    if len(single) < plan.captions:
        raise InputError(f"{plan.directory} has {len(single)} captions of one object to draw, not {plan.captions}")
    return single


def cell_path(workdir: pathlib.Path, setting: Setting, seed: int, captions: Sequence[str]) -> pathlib.Path:
    """Returns the file of a cell's result, whose name stands for all that the result depends on."""
    folders = [folder for folder in ("clip", setting.prior, setting.decoder) if folder]
    models = {
        folder: [
            (workdir / folder / "config.json").read_text(),
            checkpoint.steps_of(workdir / folder / checkpoint.FOLDER),
        ]
        for folder in folders
    }
    known = [dataclasses.asdict(setting), seed, list(captions), models, results.versions()]
    return workdir / CELLS / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}.json"


class Studio:
    """The trained parts, and the images they make; each network is read and compiled once for each way to sample it."""

    def __init__(self, workdir: pathlib.Path, plan: Plan):
        self._workdir, self._plan = workdir, plan
        self._models: dict[Any, unclip.UnCLIP] = {}
        self._pictures = pictures(plan)
        self.captions = [item.caption for item in self._pictures]
        clip: Any = self._model().part("clip").stage
        self._true = self._model().embed_images(results.pixels_of(self._pictures, side=clip.network.image_size))

    def _model(self, *, name: str = "", folder: str = "", sampling: Mapping[str, Any] | None = None) -> unclip.UnCLIP:
        """CLIP and one other part, sampled in its own way."""
        key = (folder, tuple((sampling or {}).items()))
        if key not in self._models:
            workdirs = {"clip": str(self._workdir / "clip")} | ({name: str(self._workdir / folder)} if name else {})
            self._models[key] = unclip.UnCLIP.load(
                workdirs, sampling={name: sampling} if sampling else {}, microbatch=self._plan.batch_size
            )
        return self._models[key]

    def measure(self, setting: Setting, seed: int) -> dict[str, Any]:
        """Returns a cell's result.

        It holds "verdicts", name of VERDICTS -> one number from 0 to 1 for each caption. With a prior there is "cosine"
        to the true z_i; where variances are compared also what `spread_of` says.
        """
        z_i, numbers = self._embed(setting, seed)
        sampling = {"guidance_scale": setting.guidance_scale}
        decoder = self._model(name="decoder", folder=setting.decoder, sampling=sampling)
        images = decoder.decode(z_i, self.captions, seed=seed)
        return {"verdicts": verdicts(images, self.captions), **numbers}

    def _embed(self, setting: Setting, seed: int) -> tuple[Any, dict[str, Any]]:
        """The embeddings to decode, and what is measured of them."""
        if setting.embedding == "dropped":
            return None, {}
        if setting.embedding == "true":
            return self._true, {}
        if not setting.prior:
            return self._model().embed_text(self.captions), {}
        model = self._model(name=setting.prior, folder=setting.prior, sampling=setting.prior_sampling)
        numbers = {}
        if setting.table == "variances":
            drawn = self._unnormalised(model, seed)
            numbers = spread_of(drawn, self._true)
            z_i = drawn[:, 0] / np.linalg.norm(drawn[:, 0], axis=1, keepdims=True)
        else:
            z_i = model.sample_prior(self.captions, prior=setting.embedding, seed=seed)
        return z_i, {"cosine": (z_i * self._true).sum(1).tolist(), **numbers}

    def _unnormalised(self, model: unclip.UnCLIP, seed: int) -> np.ndarray:
        """What the diffusion prior's sampler leaves, [n, 2, d], in units in which a true z_i has length 1."""
        stage: Any = model.part("prior_diffusion").stage
        fields = model.prior_fields(self.captions, "prior_diffusion")
        return model.predictor.run("prior_diffusion", "sample_x_start", fields, seed=seed) / stage.space.factor


def spread_of(drawn: Float[np.ndarray, "n 2 d"], true: Float[np.ndarray, "n d"]) -> dict[str, Any]:
    """Measures two draws of an embedding for each caption, not normalised, beside the true ones.

    Returns:
      norm: lengths of the first draws; those of true ones are 1.
      variance: the sum of the first draws' variances by coordinate, over that of the true ones.
      spread: the mean squared distance of two draws over that of a draw and the true embedding, which is 1 where
        draws have the distribution of the truth, whatever that is: then the two pairs are alike.
    """
    first, second = drawn[:, 0], drawn[:, 1]
    return {
        "norm": np.linalg.norm(first, axis=1).tolist(),
        "variance": float(first.var(0).sum() / true.var(0).sum()),
        "spread": float(np.square(first - second).sum(1).mean() / np.square(first - true).sum(1).mean()),
    }


def verdicts(images: np.ndarray, captions: Sequence[str]) -> dict[str, list[float]]:
    """Returns, for each of VERDICTS, what the oracle says of each image."""
    rates = [
        oracle.score_readings([reading], [caption])["single"]
        for reading, caption in zip(oracle.read(images), captions, strict=True)
    ]
    return {name: [rate[name] for rate in rates] for name in VERDICTS}


def run(workdir: pathlib.Path, *, part: int, parts: int, stop: Polled) -> int:
    """Makes one part of the cells, but for those that are there; returns an exit code."""
    plan = Plan.read(workdir)
    captions = [item.caption for item in pictures(plan)]
    cells = [(setting, seed) for setting in plan.part(part, parts) for seed in plan.seeds]
    missing = [cell for cell in cells if not cell_path(workdir, *cell, captions).exists()]
    (workdir / CELLS).mkdir(exist_ok=True)
    studio = Studio(workdir, plan) if missing else None
    progress = metrics.Progress(
        "cells", start=len(cells) - len(missing), total=len(cells), examples_per_step=plan.captions
    )
    for done, (setting, seed) in enumerate(missing, start=len(cells) - len(missing) + 1):
        if stop.poll():
            progress.close()
            return programs.REQUEUE
        assert studio
        result = studio.measure(setting, seed)
        path = cell_path(workdir, setting, seed, captions)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"setting": dataclasses.asdict(setting), "seed": seed, **result}) + "\n")
        temporary.replace(path)
        progress.report(done, {"both": float(np.mean(result["verdicts"]["both"]))})
    progress.close()
    return programs.DONE


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("workdir", "runs/ablations", "Folder of the trained parts and the plan.")
    flags.DEFINE_integer("part", 0, "Which part of the cells to make.", lower_bound=0)
    flags.DEFINE_integer("parts", 1, "How many parts there are.", lower_bound=1)
    flags.DEFINE_string("compile_cache", "~/.cache/unclip_jax", "Compiled programs, kept between runs; '' is off.")


def main(argv: Sequence[str]) -> int:
    del argv
    options = flags.FLAGS
    programs.start_logging()
    stop = Stopping()
    programs.start_jax(compile_cache=options.compile_cache)
    return run(pathlib.Path(options.workdir).expanduser(), part=options.part, parts=options.parts, stop=stop)


if __name__ == "__main__":
    define_flags()
    programs.run(main)
