"""The exceptions that a user of ftjax is meant to read."""

import errno
import os


class FtjaxError(ValueError):
    """Input that ftjax cannot use: a file, a row, a key or a shape.

    The message is complete by itself: which file, row or key is wrong, what was expected, and what to do. The command
    line prints it without a traceback. Any other exception is a fault of ftjax and keeps its traceback.
    """


class NotFinite(FtjaxError):
    """A loss, logits or vectors that are NaN or infinite, so that no score computed from them has a meaning."""


# What to do about a model whose outputs are not finite.
WEIGHTS = (
    "Its weights hold values that are not finite, or overflow in the dtype of computation: load another checkpoint, or "
    "set the dtype to float32 or bfloat16"
)


# Errors of the operating system that the user can mend: of disks, folders and permissions.
OF_DISKS: tuple[int, ...] = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)
OF_DISKS += (errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EEXIST)


def of_disk(error: BaseException) -> str:
    """The message of an error about a disk, a folder or a permission, with the file; empty for other kinds of errors.

    Libraries raise their own exceptions for such errors, and their text contains the operating system's message.
    """
    if isinstance(error, OSError) and error.errno in OF_DISKS:
        if error.errno == errno.ENOENT and error.filename is None and _folder_is_gone():
            return "the folder that this command runs in does not exist any more; change to another one"
        file = "" if error.filename is None else f"{error.filename}: "
        exists = "a file, or a link to nothing, where a folder is expected"
        return f"{file}{exists if error.errno == errno.EEXIST else error.strerror}"
    texts = [os.strerror(number) for number in OF_DISKS[:7]]
    return reason(error) if any(text in str(error) for text in texts) else ""


def _folder_is_gone() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def reason(error: BaseException) -> str:
    """The message of a library's error in one line, for the middle of a sentence."""
    return " ".join((str(error) or type(error).__name__).split())[:300].rstrip(".")


def nearest(word: str, choices) -> str:
    """` (did you mean "x"?)` for the choice closest to `word`, or an empty string when none is close."""
    import difflib

    close = difflib.get_close_matches(str(word), [str(c) for c in choices], n=1, cutoff=0.5)
    return f' (did you mean "{close[0]}"?)' if close else ""


def check_known(name: str, known, what: str, more: str = "") -> None:
    """Raise FtjaxError for a name that is none of those known.

    Args:
        name: The name.
        known: The names that there are.
        what: Where the name stands and what it is of, such as `task.kind: unknown task`.
        more: What may stand there beside them.
    """
    if name not in known:
        raise FtjaxError(f"{what} {name!r}{nearest(name, known)}; expected one of {', '.join(known)}{more}")
