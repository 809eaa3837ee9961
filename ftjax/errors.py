"""The exceptions that a user of ftjax is meant to read."""


class FtjaxError(ValueError):
    """Input that ftjax cannot use: a file, a row, a key or a shape.

    The message is complete by itself: which file, row or key is wrong, what was expected, and what to do. The command
    line prints it without a traceback. Any other exception is a fault of ftjax and keeps its traceback.
    """


class NotFinite(FtjaxError):
    """A loss, logits or vectors that are NaN or infinite, so that no score computed from them has a meaning."""


def nearest(word: str, choices) -> str:
    """` (did you mean "x"?)` for the choice closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""
