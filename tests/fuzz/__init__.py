"""Hostile bytes by the hundred thousand: `make fuzz`. What was found once stays in `corpus`, for every run."""
