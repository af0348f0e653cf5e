"""Has people compare the images of models, as the paper does (section 5.2): makes the page, and scores the answers.

    python -m unclip_jax.human_study make --out=study --captions=1000 --model=ours=images/a --model=glide=images/b
    python -m unclip_jax.human_study score --key=study/key.json --answers=answers-ann.json --answers=answers-bob.json

A model is a name and a folder: one that `generate` wrote (`folder@ar` where it drew by several priors), or one with
`captions.csv` (file_name,caption) or `captions.jsonl`. Every two models are compared. Questions are of photorealism and
caption_similarity, between the first images of a caption, and of diversity, between grids of 16.

Raters get the folder `page`, open index.html in a browser, without a network, and send back the file that it saves;
`key.json` says which model made what and stays behind. The scores are written beside the key, as results.json and
results.md: how often a model beats another, "Not sure" being half a win of each, with 95% intervals; Elo ratings by
GLIDE's formula; and how well raters agree.
"""

import json
import pathlib
import re
import secrets
from collections.abc import Sequence

from absl import flags

from unclip_jax import programs
from unclip_jax.data import sealed
from unclip_jax.errors import InputError
from unclip_jax.human_study import answers, captioned_images, page, questions, scores

COMMANDS = ("make", "score")


def make() -> None:
    """Makes a study of the flags' models."""
    options = flags.FLAGS
    if not options.out:
        raise InputError("--out is missing, the folder that the study is written to; for example --out=study")
    out = pathlib.Path(options.out).expanduser()
    folders = {}
    for given in options.model:
        name, _, folder = given.partition("=")
        if not re.fullmatch(r"[^|\s][^|\n]*", name) or not folder:
            raise InputError(f"--model={given} is not NAME=FOLDER; for example --model=ours=images/ours")
        if name in folders:
            raise InputError(f"two models are named {name!r}; give each a name of its own")
        folders[name] = folder
    images = {name: captioned_images.read(folder) for name, folder in folders.items()}
    seed = secrets.randbits(64) if options.seed is None else options.seed
    drawn = questions.draw(images, kinds=options.questions, captions=options.captions, seed=seed)
    study = page.write(out, drawn, models=folders, seed=seed, size=options.size)
    used, known = len({question.caption for question in drawn}), len(set().union(*images.values()))
    print(f"study {study.study}: {len(drawn)} questions about {used} of {known} captions")
    print(f"give raters the folder {out / page.PAGE} and keep {out / page.KEY}, which names the models")


def score() -> None:
    """Scores the answers that the flags name."""
    options = flags.FLAGS
    if not options.key:
        raise InputError("--key is missing, the key.json of the study; for example --key=study/key.json")
    key = pathlib.Path(options.key).expanduser()
    study = page.read_key(key)
    files = [pathlib.Path(path).expanduser() for path in options.answers]
    results = scores.score(study, answers.read(files, study, partial=options.partial))
    out = pathlib.Path(options.out).expanduser() if options.out else key.parent
    table = scores.markdown(results)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=1) + "\n"), ("results.md", table)):
        with sealed.Replacing(out / name) as file:
            file.write(text.encode())
    print(table)
    print(f"written to {out / 'results.json'} and {out / 'results.md'}")


def define_flags() -> None:
    """Defines the program's flags; only where it is the program, for others have flags of the same names."""
    flags.DEFINE_multi_string("model", [], "NAME=FOLDER of a model's images; at least two.")
    flags.DEFINE_string("out", "", "Folder of the study (make), or of its results (score; by default the key's).")
    flags.DEFINE_list("questions", list(questions.KINDS), "Kinds of question, in the order in which they are asked.")
    flags.DEFINE_integer("captions", 0, "Captions to draw; 0 takes all that the models share.", lower_bound=0)
    flags.DEFINE_integer("size", 0, "Pixels a side at which all images are shown; 0 leaves them.", lower_bound=0)
    flags.DEFINE_integer(
        "seed", None, "Of captions, sides and order; a drawn one, kept in the key, if not given.", lower_bound=0
    )
    flags.DEFINE_string("key", "", "The study's key.json.")
    flags.DEFINE_multi_string("answers", [], "A file that the page saved, for each rater.")
    flags.DEFINE_bool("partial", False, "Score files that leave questions unanswered.")


def main(argv: Sequence[str]) -> int:
    if len(argv) < 2:
        raise InputError("say what to do: python -m unclip_jax.human_study make, or score")
    {"make": make, "score": score}[argv[1]]()
    return programs.DONE


if __name__ == "__main__":
    define_flags()
    programs.run(main, commands=COMMANDS)
