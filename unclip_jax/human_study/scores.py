"""What the answers of a study say: how often a model beats another, Elo ratings, and whether raters agree."""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

from unclip_jax.human_study import elo
from unclip_jax.human_study.answers import Ballot
from unclip_jax.human_study.page import Study
from unclip_jax.human_study.questions import LEFT, NOT_SURE, Question

CONFIDENCE = 0.95


def half_width(probability: float, count: int) -> float:
    """Returns half the width of the 95% interval around a probability measured on `count` comparisons.

    It is the normal approximation of the paper's appendix B, z sqrt(p (1 - p) / n). At 0 and 1 it is 0, which says
    nothing: there the approximation does not hold.
    """
    return float(scipy.stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt(probability * (1 - probability) / count))


def score(study: Study, ballots: Sequence[Ballot]) -> dict[str, Any]:
    """Returns all results of a study, as `results.json` holds them.

    Several raters of one question are no several questions: a question counts once, with the mean of its raters' votes.
    """
    kinds = list(dict.fromkeys(question.kind for question in study.questions))
    return {
        "study": study.study,
        "models": study.models,
        "confidence": CONFIDENCE,
        "raters": [_rater(ballot) for ballot in ballots],
        "questions": {kind: _kind(study, ballots, kind) for kind in kinds},
    }


def _rater(ballot: Ballot) -> dict[str, Any]:
    choices = list(ballot.choices.values())
    sure = [choice for choice in choices if choice != NOT_SURE]
    return {
        "rater": ballot.rater,
        "answers": len(choices),
        "not_sure": choices.count(NOT_SURE) / len(choices) if choices else None,
        "left": sure.count(LEFT) / len(sure) if sure else None,  # half, but for chance: sides are balanced
        "median_seconds": statistics.median(ballot.seconds.values()) if ballot.seconds else None,
    }


def _kind(study: Study, ballots: Sequence[Ballot], kind: str) -> dict[str, Any]:
    names = list(study.models)
    asked = {n: question for n, question in enumerate(study.questions, 1) if question.kind == kind}
    pairs = [_pair(asked, ballots, first, second) for first, second in itertools.combinations(names, 2)]
    wins = np.zeros((len(names), len(names)))
    for (i, j), pair in zip(itertools.combinations(range(len(names)), 2), pairs, strict=True):
        wins[i, j] = pair["wins"] + pair["not_sure"] / 2
        wins[j, i] = pair["losses"] + pair["not_sure"] / 2
    without_elo = elo.unbounded(wins, names)
    rated = None if without_elo else dict(zip(names, elo.ratings(wins, names).tolist(), strict=True))
    return {"pairs": pairs, "elo": rated, "why_no_elo": without_elo, "agreement": _agreement(asked, ballots)}


def _pair(asked: Mapping[int, Question], ballots: Sequence[Ballot], first: str, second: str) -> dict[str, Any]:
    """Returns how often `first` beats `second`: votes of each sort, and the mean over questions."""
    votes: dict[int, list[float]] = {}
    for number, question in asked.items():
        if {question.left, question.right} != {first, second}:
            continue
        for ballot in ballots:
            if choice := ballot.choices.get(number):
                of_left = _vote(choice)
                votes.setdefault(number, []).append(of_left if question.left == first else 1 - of_left)
    every = [vote for of_question in votes.values() for vote in of_question]
    probability = statistics.fmean(statistics.fmean(of_question) for of_question in votes.values()) if votes else None
    return {
        "model": first,
        "against": second,
        "probability": probability,
        "half_width": None if probability in (None, 0, 1) else half_width(probability, len(votes)),
        "questions": len(votes),
        "votes": len(every),
        "wins": every.count(1),
        "not_sure": every.count(0.5),
        "losses": every.count(0),
    }


def _vote(choice: str) -> float:
    """Returns what a choice is for the left side: a win, half a win or none."""
    return 0.5 if choice == NOT_SURE else float(choice == LEFT)


def _agreement(asked: Mapping[int, Question], ballots: Sequence[Ballot]) -> dict[str, Any] | None:
    """Returns how well raters agree on a kind of question; None where no two answered the same one."""
    table = np.array(
        [[_vote(ballot.choices[n]) if n in ballot.choices else np.nan for n in asked] for ballot in ballots]
    )
    several = np.isfinite(table).sum(0) > 1
    if not several.any():
        return None
    return {"questions": int(several.sum()), "same": same_answers(table), "alpha": krippendorff_alpha(table)}


def same_answers(table: Float[np.ndarray, "raters questions"]) -> float:
    """Returns the share of equal answers among all pairs of answers to one question; NaN is no answer."""
    equal = pairs = 0
    for first, second in itertools.combinations(table, 2):
        both = np.isfinite(first) & np.isfinite(second)
        equal, pairs = equal + int((first == second)[both].sum()), pairs + int(both.sum())
    return equal / pairs


def krippendorff_alpha(table: Float[np.ndarray, "raters questions"]) -> float | None:
    """Returns Krippendorff's alpha for values on an interval scale: 1 is full agreement, 0 what chance gives.

    Votes are of the left side (1, ½ or 0), for that is all that raters know. Questions with fewer than two answers do
    not count; NaN is no answer. None where all answers are one and the same, for chance would then agree as well.
    """
    columns = [column[np.isfinite(column)] for column in table.T]
    columns = [column for column in columns if len(column) > 1]
    values = np.concatenate(columns)
    within = sum(_squares(column) / (len(column) - 1) for column in columns) / len(values)
    between = _squares(values) / (len(values) * (len(values) - 1))
    return float(1 - within / between) if between else None


def _squares(values: Float[np.ndarray, "n"]) -> float:
    """Returns the sum of (v_i - v_j)² over all ordered pairs."""
    return float(2 * len(values) * np.sum((values - values.mean()) ** 2))


def markdown(results: Mapping[str, Any]) -> str:
    """Returns the results as Markdown: a table like the paper's Table 1, one of Elo ratings, and the raters."""
    kinds = results["questions"]
    titles = " | ".join(kind.replace("_", " ") for kind in kinds)
    rule = "| --- |" + " --- |" * len(kinds)
    lines = [f"| probability that | {titles} |", rule]
    for rows in zip(*(of_kind["pairs"] for of_kind in kinds.values()), strict=True):
        cells = " | ".join(_share(row) for row in rows)
        lines.append(f"| {rows[0]['model']} beats {rows[0]['against']} | {cells} |")
    lines += ["", f"| Elo | {titles} |", rule]
    for model in results["models"]:
        cells = " | ".join(f"{of_kind['elo'][model]:+.0f}" if of_kind["elo"] else "–" for of_kind in kinds.values())
        lines.append(f"| {model} | {cells} |")
    lines.append("")
    for name, of_kind in kinds.items():
        lines += _remarks(name.replace("_", " "), of_kind)
    raters = ", ".join(f"{row['rater']} ({row['answers']} answers)" for row in results["raters"])
    return "\n".join([*lines, f"Study {results['study']}; raters: {raters}.", ""])


def _share(row: Mapping[str, Any]) -> str:
    if row["probability"] is None:
        return "–"
    error = "" if row["half_width"] is None else f" ± {100 * row['half_width']:.1f}"
    return f"{100 * row['probability']:.1f}{error} % (n = {row['questions']})"


def _remarks(name: str, of_kind: Mapping[str, Any]) -> list[str]:
    lines = [f"{name}: no Elo, for {of_kind['why_no_elo']}."] if of_kind["why_no_elo"] else []
    if found := of_kind["agreement"]:
        alpha = "undefined" if found["alpha"] is None else f"{found['alpha']:.2f}"
        same = f"{100 * found['same']:.0f} % of the pairs of answers to {found['questions']} questions"
        lines.append(f"{name}: raters agree in {same}; Krippendorff's alpha {alpha}.")
    return [*lines, ""] if lines else []
