"""Errors that a user can fix, as messages of one line."""

import difflib


def one_line(text: object, most: int = 200) -> str:
    """Return `text` (an error, a user's value) as one line, shortened in the middle to at most `most` characters."""
    line = " ".join(str(text).split())
    head = most * 2 // 3
    return line if len(line) <= most else f"{line[:head]} ... {line[head + 5 - most :]}"


class UserError(ValueError):
    """An input that a user can fix. The message is one line: `<file or value>: <what is wrong>: <how to fix it>`.
    Messages of more than MAX_LENGTH characters, e.g. with a long value of the user's, are shortened in the middle."""

    MAX_LENGTH = 800
    alone = False
    """True if, of several processes that train together, only this one raised the error."""

    def __init__(self, message: str = "") -> None:
        super().__init__(message if len(message) <= self.MAX_LENGTH else one_line(message, self.MAX_LENGTH))


def nearest(word: object, options) -> str:
    """Return " (did you mean X?)" for the closest of `options`, or "" if none is close."""
    close = difflib.get_close_matches(str(word)[:100], list(options), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
