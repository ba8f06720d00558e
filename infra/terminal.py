"""What a terminal may be sent: untrusted text without control characters, colours where they are wanted.

Text of a model or of a file is untrusted: an escape sequence in it must not move somebody's cursor.
"""

import os

GAIN = "\x1b[38;5;32m"  # blue and orange differ for colour-blind readers too
LOSS = "\x1b[38;5;208m"
FAINT = "\x1b[2m"
RESET = "\x1b[0m"


def printable(text, keep=""):
    """text with U+FFFD in place of every control character, but for those of `keep`."""
    return "".join(c if c.isprintable() or c in keep else "\ufffd" for c in text)


def wants_colour(stream):
    """no-color.org: NO_COLOR set to anything but nothing turns colours off; so does a pipe."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def paint(code, text, colour=True):
    """text in a colour, or as it is."""
    return f"{code}{text}{RESET}" if colour else text
