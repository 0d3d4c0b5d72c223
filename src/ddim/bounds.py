"""The largest numbers that functions and options take, each in one place."""

__all__ = ["LARGEST_SEED", "MOST_IMAGES", "MOST_LEVELS"]

LARGEST_SEED = 2**32 - 1
"""torch's CPU generator keeps 32 bits of a seed."""

MOST_IMAGES = 1_000_000
"""Images of one run, each of which is a row of its record; and points of a path."""

MOST_LEVELS = 1_000_000
"""Levels of a noise schedule."""
