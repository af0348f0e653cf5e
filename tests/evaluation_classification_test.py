"""Zero-shot classification against its definition, written out; labels that are missing, names and templates."""

import numpy as np
import pytest
from evaluated import SIZE, WIDTH, Examples, create, run, unit

from unclip_jax.errors import InputError
from unclip_jax.evaluation import classification

NAMES = ("cat", "hot dog", "cow", "owl", "yak", "elk", "bat")
TEMPLATES = ("a {}", "{} and {}, really", "one {}")
COUNT = 10


class Words:
    """A tokenizer of whole prompts, and the text tower that reads what it made."""

    def __init__(self, seed=0):
        self.rng, self.vectors = np.random.default_rng(seed), {}

    def of(self, prompt):
        return self.vectors.setdefault(prompt, unit(self.rng, 1)[0])

    def __call__(self, prompts, length):
        assert length == WIDTH and 0 < len(prompts) <= SIZE
        return np.stack([self.of(prompt) for prompt in prompts])


def examples(labels, names=NAMES, **fields):
    pictures = unit(np.random.default_rng(3), len(labels))
    return Examples(picture=pictures, label=np.asarray(labels), names=names, **fields)


def best(words, pictures, templates=TEMPLATES, names=NAMES):
    """Classes of every picture, nearest first, by the mean of the templates' embeddings."""
    means = []
    for name in names:
        mean = np.mean([words.of(template.replace("{}", name)) for template in templates], 0, dtype=np.float64)
        means.append(mean / np.linalg.norm(mean))
    return np.argsort(-pictures @ np.stack(means, 1), axis=1)


@pytest.mark.parametrize("masked", [(), (1, 9)])
def test_zero_shot_is_nearness_to_the_mean_of_the_templates(masked):
    words = Words()
    labels = np.array([0, 3, 3, -1, 6, 5, 1, 3, -1, 0])
    data = examples(labels, masked=masked)
    scores = run("zero_shot", data, tokenize=words, templates=TEMPLATES)
    kept = [row for row in range(COUNT) if labels[row] >= 0 and row not in masked]
    order, labels = best(words, data.sources["labelled"]["picture"])[kept], labels[kept]
    assert scores["zero_shot_top1"] == pytest.approx(np.mean(order[:, 0] == labels))
    among = [label in row[:5] for label, row in zip(labels, order, strict=True)]
    assert scores["zero_shot_top5"] == pytest.approx(np.mean(among))
    shares = [np.mean(order[labels == label, 0] == label) for label in set(labels)]
    assert scores["zero_shot_mean_per_class"] == pytest.approx(np.mean(shares))
    assert len(words.vectors) == len(NAMES) * len(TEMPLATES)


def test_images_that_are_their_captions_are_all_named_rightly_and_five_classes_have_no_top_five():
    words = Words()
    data = examples(np.arange(COUNT) % 5, names=NAMES[:5])
    pictures = np.stack([words.of(f"a {name}") for name in NAMES[:5]])
    data.sources["labelled"]["picture"] = pictures[np.arange(COUNT) % 5]
    scores = run("zero_shot", data, tokenize=words, templates=("a {}",))
    assert scores == {"zero_shot_top1": 1.0, "zero_shot_mean_per_class": 1.0}


def test_rare_classes_weigh_as_much_as_frequent_ones():
    right = np.array([True] * 8 + [False, True])
    assert classification.mean_per_class(right, np.array([0] * 8 + [4, 4])) == pytest.approx((1 + 0.5) / 2)


def test_names_and_templates_are_the_datas_the_configs_or_a_files(tmp_path):
    (tmp_path / "names.txt").write_text("tom cat\n\n  frankfurter \nmoo_cow\n")
    (tmp_path / "templates.txt").write_text("a {} indeed\n")

    def prompts(**config):
        words = Words()
        run("zero_shot", examples([0, 1, 2], names=("cat", "hot_dog", "cow")), tokenize=words, **config)
        return list(words.vectors)

    assert prompts(templates=("a {}", "b {}")) == ["a cat", "b cat", "a hot dog", "b hot dog", "a cow", "b cow"]
    assert prompts(classes=("x", "y_y", "z"), templates=("{}",)) == ["x", "y_y", "z"]
    files = {"classes": (f"@{tmp_path}/names.txt",), "templates": ("{}", f"@{tmp_path}/templates.txt")}
    assert prompts(**files) == ["tom cat", "a tom cat indeed", "frankfurter",
                                "a frankfurter indeed", "moo_cow", "a moo_cow indeed"]  # fmt: skip
    ours = prompts()
    assert "a photo of a hot dog." in ours and len(ours) == 3 * len(classification.TEMPLATES)


def test_where_nothing_has_a_label_nothing_is_said(caplog):
    assert run("zero_shot", examples([-1] * 6), tokenize=Words()) == {}
    assert "none of the first 11 examples has a label" in caplog.text


@pytest.mark.parametrize(("options", "message"), [
    ({"templates": ("a {}", "a cat")}, "templates has 'a cat', which has no {} for the name of a class"),
    ({"templates": (3,)}, "templates has 3; it takes texts, or '@path'"),
    ({"templates": ("@nowhere/t.txt",)}, "templates: the file 'nowhere/t.txt' cannot be read"),
    ({"classes": NAMES[:6], "label": "kind"}, "classes has 6 names, but config.evaluation.label='kind' has 7 classes"),
    ({"tokenize": None}, "needs a stage that reads captions"),
    ({"names": ("cat",), "label": "kind"}, "label='kind' has one class"),
])
def test_what_does_not_fit_is_refused_before_the_first_step(options, message):
    names = options.pop("names", NAMES)
    with pytest.raises(InputError, match=message):
        create("zero_shot", examples([0, 1], names=names), **{"tokenize": Words(), **options})
