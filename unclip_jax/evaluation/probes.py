"""Linear probes: how well a linear classifier on frozen features does (Radford et al., 2021, appendix A.3)."""

import logging
from collections.abc import Callable

import numpy as np
import scipy  # its parts are imported when they are used: all of optimize takes half a second of a program's start
from jaxtyping import Float, Int

from unclip_jax.evaluation.classification import Labelled, mean_per_class

_LOG = logging.getLogger(__name__)
_DECADES = 6.0  # strengths lie between 1e-6 and 1e6
_FINEST = 0.125  # decades between strengths in the end
_HELD_OUT = 5  # one in so many training examples chooses the strength


def fit(
    features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], *, classes: int, strength: float
) -> tuple[Float[np.ndarray, "d k"], Float[np.ndarray, "k"]]:
    """Fits multinomial logistic regression, by L-BFGS from zero in at most 1,000 iterations, float64.

    Args:
      features, labels: the examples, labels in [0, classes).
      classes: k.
      strength: of the penalty, above 0, in units of examples.

    Returns:
      The weights and biases that minimise, with p = softmax(features @ weights + biases), the sum over examples of
      -log p(label), plus strength / 2 * |weights|^2: scikit-learn's objective with C = 1 / strength.
    """
    x = np.asarray(features, np.float64)
    count, centre = len(x), x.mean(0)
    x = x - centre  # which changes biases only
    # It is solved for weights in whose coordinates the Hessian at zero, where all p are 1 / k, is 1 (but for what adds
    # the same to all classes). Embeddings lie in a narrow cone: in their own coordinates 1,000 iterations may not do.
    curvature, axes = np.linalg.eigh(x.T @ x / classes + strength * np.eye(x.shape[1]))
    scaled = axes / np.sqrt(np.maximum(curvature, strength))
    one = np.sqrt(classes / count)
    inputs = np.concatenate([x @ scaled, np.full((count, 1), one)], 1)
    penalty = strength * scaled.T @ scaled
    rows = np.arange(count)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        solved = flat.reshape(-1, classes)
        log_p = scipy.special.log_softmax(inputs @ solved, axis=1)
        error = np.exp(log_p)
        error[rows, labels] -= 1.0
        gradient = inputs.T @ error
        pull = penalty @ solved[:-1]
        gradient[:-1] += pull
        return -log_p[rows, labels].sum() + 0.5 * (solved[:-1] * pull).sum(), gradient.ravel()

    options = {"maxiter": 1000, "maxfun": 2000, "ftol": 0.0, "gtol": 1e-5}
    start = np.zeros(inputs.shape[1] * classes)
    solution = scipy.optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    found = solution.x.reshape(-1, classes)
    weights = scaled @ found[:-1]
    return weights, found[-1] * one - centre @ weights


def sweep(score: Callable[[float], float]) -> float:
    """Returns the strength of the highest score, of equal ones the strongest.

    As Radford et al. (2021, A.3) search: 1e-6, 1e-4 … 1e6 first, then both neighbours of the best at half the distance,
    and again, down to eight strengths a decade.
    """
    scores: dict[float, float] = {}

    def best() -> float:
        return max(scores, key=lambda exponent: (scores[exponent], exponent))

    step = 2.0
    exponents = [float(exponent) for exponent in np.arange(-_DECADES, _DECADES + step, step)]
    while True:
        for exponent in exponents:
            scores[exponent] = score(10.0**exponent)
        if step <= _FINEST:
            return 10.0 ** best()
        step /= 2
        exponents = [exponent for exponent in (best() - step, best() + step) if abs(exponent) <= _DECADES]


class LinearProbe(Labelled):
    """How often a linear classifier is right that was trained on `config.evaluation.probe_examples` frozen features.

    The features are z_i, of length 1. The strength of the penalty is chosen on a fifth of the training examples; the
    classifier is then trained anew on all of them. Examples without a label do not count.
    """

    needs = ("z_i",)

    def check(self):
        super().check()
        self.data.count("labelled_training")

    def run(self, params, frozen):
        classes = len(self.class_names)
        wanted = self.config.get("probe_examples", 10_000)
        x, y = self.labelled("z_i", params, frozen, source="labelled_training", limit=wanted)
        test_x, test_y = self.labelled("z_i", params, frozen, source="labelled", limit=self.config.examples)
        if len(y) < _HELD_OUT or not len(test_y):
            _LOG.warning("linear probe: %d examples have labels to train on, %d to measure on", len(y), len(test_y))
            return
        # The examples come in random order, so their last fifth is a random one.
        kept = len(y) - len(y) // _HELD_OUT

        def score(strength: float) -> float:
            weights, biases = fit(x[:kept], y[:kept], classes=classes, strength=strength)
            return float(((x[kept:] @ weights + biases).argmax(1) == y[kept:]).mean())

        strength = sweep(score)
        weights, biases = fit(x, y, classes=classes, strength=strength)
        right = (test_x @ weights + biases).argmax(1) == test_y
        yield "probe_top1", float(right.mean())
        yield "probe_mean_per_class", mean_per_class(right, test_y)
        yield "probe_strength", strength
