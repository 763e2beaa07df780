"""The guard: the SGLang server and what it is asked about an image."""
