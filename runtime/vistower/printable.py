"""Text of unknown origin, made safe to show: on a terminal, in a log, in a message."""

from __future__ import annotations


def printable(text: str, keep: str = "") -> str:
    r"""The text with every character that is not printable written as an escape.

    A terminal acts on control characters (``\x1b[2J`` clears it), a line break forges a line of a
    log, and bidirectional controls turn a name around; a lone surrogate cannot be printed at all.

    Args:
        text: what is to be shown.
        keep: characters to leave alone, e.g. a line break in text of our own.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in keep
        else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )
