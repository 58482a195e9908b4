"""Text from data, as it is put into Markdown: one line, in which nothing is markup."""

import re
from typing import Any

from markupsafe import Markup

# What Markdown could take for markup in the middle of a line. An asterisk after a word, as in
# "BN*", and an underscore within one begin nothing, nor does a bracket without a link behind it.
LETTER = r"[^\W_]"
INLINE = re.compile(
    rf"[\\`|~$]|(?<!{LETTER})\*|\*(?=[^\s,.:;/)])|(?<!{LETTER})_|_(?!{LETTER})|\](?=[(\[:]|$)"
)
# And at the start of one: headings, quotes, rules and lists
START = re.compile(r"^(?:(?=#|>|[-+](?:\s|$)|-[-\s]*$)|(\d+)(?=[.)](?:\s|$)))")


def literal(value: Any) -> Any:
    """A value for `{{ }}` in a template of Markdown; what is `Markup` stays as it is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = INLINE.sub(r"\\\g<0>", one_line(value))
    # What looks like HTML, or stands for a character
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    return Markup(START.sub(r"\1\\", text))


def code(value: str) -> Markup:
    """A value in a span of code, whatever backticks it has."""
    text = one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text.startswith("`") or text.endswith("`"))
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def one_line(text: str) -> str:
    """A text with single spaces for line breaks and all that cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
