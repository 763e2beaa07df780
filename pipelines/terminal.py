"""Text of others in a terminal: it must not move the cursor, change colours, or pass for lines of Sluice."""


def printable(text: str) -> str:
    """The same text on one line; what is not a visible character (control, bidi, surrogate) becomes U+FFFD."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
