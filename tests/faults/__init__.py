"""The fault suite: everything breaks in turn while submissions stream through, and each must end once."""
