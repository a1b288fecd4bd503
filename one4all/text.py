"""Text that came with data, such as names of files and classes, made fit to be shown."""

from __future__ import annotations

import re

# Control characters; what turns the direction of text around or ends a line; half characters,
# among them bytes of a name that are no UTF-8.
_UNFIT = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: str, *, keep: str = "") -> str:
    r"""The same text, with an escape for each character that would be obeyed and not shown.

    An escape sequence in the name of a file could clear the terminal, or write over what was
    said. So ESC becomes ``\x1b``, a line feed ``\n``, and a byte that is no UTF-8 ``\xe9``.

    Args:
        text: One line of it.
        keep: Characters that are left as they are.
    """
    return _UNFIT.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python carries a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def drawn(text: str) -> str:
    """The same for Matplotlib, to which dollar signs are the bounds of a formula."""
    return shown(text, keep="\n").replace("$", r"\$")
