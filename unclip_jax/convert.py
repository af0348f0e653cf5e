"""Imports open weights: `python -m unclip_jax.convert --from=hf_clip --path=WEIGHTS --workdir=runs/clip`.

The workdir is then that of a run at step 0, which `generate`, `train`, `evaluate` and `export` take as their own:

    --from          --path                                                          --workdir
    openai_clip     a file of OpenAI's, ViT-L-14.pt or RN50.pt                      of a clip
    hf_clip         a folder of transformers' CLIPModel                             of a clip
    open_clip       a folder of OpenCLIP's, or a file and --config_json, or         of a clip
                    a file and --activation
    karlo           a folder of diffusers' UnCLIPPipeline, of its variations, or    of all its networks
                    with the sub-folders of both
    karlo_original  a folder with the files that Kakao Brain published              of all its networks
    kandinsky_prior a folder of KandinskyPriorPipeline or KandinskyV22PriorPipeline  of its CLIP and its prior
    glide           base.pt, upsample.pt, or those for inpainting; --vocabulary     of a decoder or an upsampler

To go on training, name the config that is there and what is to differ, beside the data:

    python -m unclip_jax.train --config=configs/imported.py:runs/clip --workdir=runs/clip --accept_changes
        --config.data.dataset=FOLDER --config.total_steps=1000

Nothing is written unless every tensor is accounted for. Exit codes: 0 done, 1 error.
"""

import logging
import pathlib
from collections.abc import Mapping

from absl import flags

from unclip_jax import digests, programs
from unclip_jax.errors import InputError, nearest
from unclip_jax.importing import clips, formats, glide, karlo, workdirs
from unclip_jax.parts import LAST

_LOG = logging.getLogger("unclip_jax.convert")  # not __main__, which nobody listens to

# Formats that hold one network, whose workdir is the one given, and formats of whole stacks, whose networks become
# its sub-folders, named as `generate --models` wants them.
ONE: Mapping[str, formats.Reader] = {
    "openai_clip": clips.openai,
    "hf_clip": clips.transformers,
    "open_clip": clips.open_clip,
    "glide": glide.glide,
}
STACKS: Mapping[str, formats.Reader] = {
    "karlo": karlo.diffusers,
    "karlo_original": karlo.original,
    "kandinsky_prior": karlo.kandinsky,
}


def convert(request: formats.Request, workdir: str) -> dict[str, str]:
    """Imports what a request names; returns part -> its workdir.

    Networks are read and written one after the other. One that cannot be imported ends the import; those before it,
    each whole, stay.

    Raises:
      InputError: unknown format, weights that are not what it says, or a workdir that holds something.
    """
    known = {**ONE, **STACKS}
    if request.format not in known:
        raise InputError(f"there is no format {request.format!r}; {nearest(request.format, known)}")
    root = workdirs.check_free(workdir)
    made: dict[str, str] = {}
    trained_on: dict[str, str] = {}
    for name, imported in known[request.format](request):
        folder = str(root if request.format in ONE else root / name)
        vocabulary = imported.config.data.vocabulary
        for network, part in (("clip", "clip"), ("last", LAST.get(name, ""))):
            if part in made and imported.config.get("frozen", {}).get(network) == "":
                with imported.config.unlocked():
                    imported.config.frozen[network] = made[part]
        workdirs.write(folder, imported, vocabulary=vocabulary, trained_on={} if name == "clip" else trained_on)
        if name == "clip":
            trained_on["frozen.clip"] = digests.fingerprint(imported.params)
        made[name] = folder
        del imported  # before the next is read
    return made


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_string("from", None, "Format of the weights.")
    flags.DEFINE_string("path", None, "File or folder of weights.")
    flags.DEFINE_string("workdir", None, "Folder to make, of one network or of one for each.")
    flags.DEFINE_string("variant", "", "Variant of configs/STAGE.py that further training would begin from.")
    flags.DEFINE_string("vocabulary", "", "Folder of the vocabulary; beside the weights by default.")
    flags.DEFINE_string("config_json", "", "OpenCLIP's config of the model.")
    flags.DEFINE_string("activation", "", "OpenCLIP's, where there is no config: gelu or quick_gelu.")


def main(argv) -> int:
    del argv
    given = flags.FLAGS.flag_values_dict()
    if not given["from"] or not given["path"] or not given["workdir"]:
        raise InputError("give --from=FORMAT, --path=WEIGHTS and --workdir=FOLDER")
    programs.start_logging()
    programs.start_jax()
    request = formats.Request(
        format=given["from"],
        path=given["path"],
        variant=given["variant"],
        vocabulary=given["vocabulary"],
        options={name: given[name] for name in ("config_json", "activation")},
    )
    for name, folder in convert(request, given["workdir"]).items():
        _LOG.info("%s of %s is in %s", name, pathlib.Path(request.path).name, folder)
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main)
