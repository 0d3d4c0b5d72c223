"""Evaluation: features, their statistics, the numbers made of them, the protocol, and tables."""
