"""Policies: the document, the prompt it makes, and the registry of its versions."""
