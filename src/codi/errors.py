"""What went wrong, said to the person who can mend it."""

import difflib


def one_line(text: object, most: int = 200) -> str:
    """Return `text` (an error, a user's value) as one line of at most `most` letters; a longer one loses its middle."""
    line = " ".join(str(text).split())
    head = most * 2 // 3
    return line if len(line) <= most else f"{line[:head]} ... {line[head + 5 - most :]}"


class UserError(ValueError):
    """An input that a user can fix. The message is one line: `<file or value>: <what is wrong>: <how to fix it>`.
    Of a longer message than MOST letters, which holds a file or a value of the user's, the middle is left out."""

    MOST = 800
    alone = False
    """Of several processes that train together, whether it befell this one alone and the others do not know."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= self.MOST else one_line(message, self.MOST))


def nearest(word: object, options) -> str:
    """' (did you mean X?)' for the closest of `options`, or ''."""
    close = difflib.get_close_matches(str(word)[:100], list(options), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
