"""The one exception that a user's input can cause.

Programs catch it, print its sentence and exit with status 1; anything else that escapes is a bug of ours and
keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: says in one sentence what is wrong, where, and what would be right."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a clause that names the known word nearest to `name`, or all known words if none is near.

    Example: `nearest("decodr", ["clip", "decoder"])` is "did you mean 'decoder'?".
    """
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.6)
    if close:
        # Of equally near words the one of the same length: a typo changes a letter more often than it adds three.
        likeness = [difflib.SequenceMatcher(None, word, name).ratio() for word in close]
        best = min(zip(close, likeness, strict=True), key=lambda pair: (-pair[1], abs(len(pair[0]) - len(name))))
        return f"did you mean {best[0]!r}?"
    return "known are " + ", ".join(known)
