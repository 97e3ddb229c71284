"""What was probably meant by a name that is not known."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], *, otherwise: str = "") -> str:
    """The name that was probably meant; if none is near, `otherwise` or all that are known."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return otherwise or f"known: {', '.join(names)}"
