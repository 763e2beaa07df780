"""Flows built from services: the Serve application, the embedded backends, and the command line."""
