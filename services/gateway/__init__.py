"""HTTP: the same moderation path, for those who ask and wait for the answer."""
