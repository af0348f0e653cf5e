"""Files of answers that the page saves, held to the study that they are of."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

from unclip_jax.errors import InputError
from unclip_jax.human_study.page import FORMAT, Study
from unclip_jax.human_study.questions import KINDS, LEFT, NOT_SURE, RIGHT


@dataclasses.dataclass(frozen=True)
class Ballot:
    """One rater's answers.

    Attributes:
      rater: the name that the rater gave.
      choices: number of a question, from 1 -> "left", "right" or "not_sure".
      seconds: number of a question -> how long its images were in sight before the answer.
    """

    rater: str
    choices: dict[int, str]
    seconds: dict[int, float]


def read(paths: Sequence[pathlib.Path], study: Study, *, partial: bool) -> list[Ballot]:
    """Reads the answers of several raters to one study.

    Args:
      paths: a file for each rater.
      study: of `page.read_key`.
      partial: whether raters may have left questions unanswered.

    Raises:
      InputError: a file is none of answers, is of another study, answers a question twice, one that does not exist or
        in a way that does not, leaves some out and `partial` is false, or two files are of one rater.
    """
    if not paths:
        raise InputError("there are no answers to score; give --answers=FILE for each rater")
    ballots: list[Ballot] = []
    files: dict[str, pathlib.Path] = {}
    for path in paths:
        ballot = _read_one(path, study)
        if ballot.rater in files:
            raise InputError(
                f"{files[ballot.rater]} and {path} are both by the rater {ballot.rater!r}; give the later one alone"
            )
        missing = [number for number in range(1, len(study.questions) + 1) if number not in ballot.choices]
        if missing and not partial:
            raise InputError(
                f"{path} leaves {len(missing)} of {len(study.questions)} questions unanswered, the first is "
                f"{missing[0]}; have the rater finish, or score what is there by --partial"
            )
        files[ballot.rater] = path
        ballots.append(ballot)
    if not any(ballot.choices for ballot in ballots):
        raise InputError("no question is answered in these files; there is nothing to score")
    return ballots


def _read_one(path: pathlib.Path, study: Study) -> Ballot:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rater, of_study, rows = str(content["rater"]), content["study"], content["answers"]
        answers = [(row["question"], row["choice"], float(row["seconds"])) for row in rows]
        known = content["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of answers that a study's page saved: {error!r}") from error
    if not known:
        raise InputError(f"{path} has format {content['format']!r}, not {FORMAT}; it was saved by another version")
    if of_study != study.study:
        raise InputError(f"{path} answers the study {of_study}, and the key is of {study.study}")
    choices: dict[int, str] = {}
    seconds: dict[int, float] = {}
    for number, choice, took in answers:
        if type(number) is not int or not 1 <= number <= len(study.questions):
            raise InputError(f"{path} answers a question {number!r}; the study has 1 to {len(study.questions)}")
        if number in choices:
            raise InputError(f"{path} answers question {number} twice; every question has one answer")
        allowed = (LEFT, RIGHT, NOT_SURE) if KINDS[study.questions[number - 1].kind].not_sure else (LEFT, RIGHT)
        if choice not in allowed:
            raise InputError(f"{path} answers question {number} by {choice!r}; known are {', '.join(allowed)}")
        choices[number], seconds[number] = choice, took
    return Ballot(rater, choices, seconds)
