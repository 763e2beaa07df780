"""The HTTP API: the same moderator as the stream worker, for clients that wait for the verdict."""
