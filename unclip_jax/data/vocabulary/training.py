"""Trains the small vocabulary: `python -m unclip_jax.data.vocabulary.training --out=DIR`.

The text is what the small runs are captioned with: the grammar of `captioned_shapes`, the Unicode names of emoji, and
a little plain English. Ids differ from run to run (see the package's docstring), so a new vocabulary orphans every
checkpoint trained with the old one: change the committed files only for a reason.
"""

import argparse
import itertools
import json
import pathlib
import random
import unicodedata
from collections.abc import Iterator

VOCABULARY_SIZE = 2048
SPECIALS = ("<|startoftext|>", "<|endoftext|>")
EMOJI_BLOCKS = ((0x2600, 0x27BF), (0x1F300, 0x1FAFF))

_SIZES = "tiny small medium large big".split()
_COLOURS = "red orange yellow green cyan blue purple pink brown magenta white grey gray black teal lime navy".split()
_TEXTURES = "solid striped dotted checkered plain outlined".split()
_SHAPES = (
    "circle square triangle star cross diamond heart ring pentagon hexagon ellipse rectangle crescent arrow".split()
)
_RELATIONS = ("left of", "right of", "above", "below", "inside", "next to", "on top of", "behind", "in front of")

_ENGLISH = """
a photo of a cat. a photo of a dog. a painting of a house by the sea. a picture of the sun above the mountains.
a man riding a brown horse on the beach. a woman with an umbrella walking in the rain. two children are playing with
a ball in the park. a plate of food with rice, vegetables and a glass of water. a black and white drawing of an old
train at the station. there is a white bird that is sitting on a tree. the city at night with many lights. a group of
people standing around a table. a bowl of fruit next to a window. a blue car is parked in front of a building. an oil
painting of flowers in a vase. a close up of a person holding a phone. several boats on the water near some houses.
a red bus driving down the street. a young girl eating a piece of cake. an image of a robot reading a book. a green
field under a cloudy sky. a cute little teddy bear on a bed. a digital art work of a castle in the clouds. a cup of
coffee on a wooden desk. a dog that is wearing a hat. a kitchen with a stove and a refrigerator. one, two, three, four
and five apples. this is not what they were looking for, but it has been very good to me and you. which of these could
be made from paper? he said she would have come if we had asked them when it was time. emoji icon symbol logo sign.
"""


def shape_captions(count: int, seed: int) -> Iterator[str]:
    """Yields `count` captions of one or two objects, in the words of the shapes grammar."""
    draw = random.Random(seed)

    def one() -> str:
        words = [draw.choice(_SIZES), draw.choice(_TEXTURES), draw.choice(_COLOURS), draw.choice(_SHAPES)]
        return " ".join(["a", *words])

    for _ in range(count):
        scene = one() if draw.random() < 0.5 else f"{one()} {draw.choice(_RELATIONS)} {one()}"
        yield f"{scene} on a {draw.choice(_COLOURS)} background"


def emoji_names() -> list[str]:
    """Returns the lower-cased Unicode names of every assigned code point in the emoji blocks."""
    points = itertools.chain.from_iterable(range(first, last + 1) for first, last in EMOJI_BLOCKS)
    return [name.lower() for name in (unicodedata.name(chr(point), "") for point in points) if name]


def train(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains `size` symbols, the two specials last; returns (symbol -> id, merges in order)."""
    import tokenizers
    import transformers

    clip = transformers.CLIPTokenizer().backend_tokenizer
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = clip.normalizer
    tokenizer.pre_tokenizer = clip.pre_tokenizer
    letters = byte_symbols()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2 * size, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    # Repetition is weight: the few words of the shapes grammar must be one symbol each, whatever emoji are called.
    text = [*shape_captions(4000, seed=0), *(emoji_names() * 3), *(_ENGLISH.split(". ") * 5)]
    tokenizer.train_from_iterator(text, trainer)
    learned = [tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]]
    merges = learned[: size - 2 * len(letters) - len(SPECIALS)]
    symbols = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), *SPECIALS]
    return {symbol: number for number, symbol in enumerate(symbols)}, merges


def byte_symbols() -> list[str]:
    """Returns one printable character per byte, printable bytes first, as byte-level BPE has it since GPT-2.

    Bytes that print (33-126, 161-172, 174-255) stand for themselves; the others for code points from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder for vocab.json and merges.txt")
    parser.add_argument("--size", type=int, default=VOCABULARY_SIZE)
    options = parser.parse_args()
    vocabulary, merges = train(options.size)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=True, indent=0) + "\n")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (options.out / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
