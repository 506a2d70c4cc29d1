"""What went wrong, said to the person who can mend it."""

import difflib


class UserError(ValueError):
    """An input that a user can mend. The message is one line: `<file or value>: <what is wrong>: <how to mend it>`."""

    alone = False
    """Of several processes that train together, whether it befell this one alone and the others do not know."""


def nearest(word: str, options) -> str:
    """' (did you mean X?)' for the closest of `options`, or ''."""
    close = difflib.get_close_matches(word, list(options), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
