"""Images: bounded reads from the object store, and their preparation for the model."""
