"""Escape untrusted text for Markdown."""

import re
from typing import Any

from markupsafe import Markup

# Characters that could be markup in the middle of a line. Names such as "BN*" stay readable: an
# asterisk after a word, an underscore within a word and a bracket without a link are not markup.
LETTER = r"[^\W_]"
INLINE = re.compile(
    rf"[\\`|~$]|(?<!{LETTER})\*|\*(?=[^\s,.:;/)])|(?<!{LETTER})_|_(?!{LETTER})|\](?=[(\[:]|$)"
)
# Markup at the start of a line: headings, quotes, rules and lists
START = re.compile(r"^(?:(?=#|>|[-+](?:\s|$)|-[-\s]*$)|(\d+)(?=[.)](?:\s|$)))")


def literal(value: Any) -> Any:
    """Escape a string for `{{ }}` in a Markdown template; return other types and `Markup` as is."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    text = INLINE.sub(r"\\\g<0>", one_line(value))
    # HTML tags and character references
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;")
    return Markup(START.sub(r"\1\\", text))


def code(value: str) -> Markup:
    """Format a string as an inline code span; it may contain backticks."""
    text = one_line(value)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text.startswith("`") or text.endswith("`"))
    return Markup(f"{fence}{pad}{text}{pad}{fence}")


def one_line(text: str) -> str:
    """Replace whitespace and unprintable characters by single spaces."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
