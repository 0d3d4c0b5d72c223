"""Measures samples against real images: features, metrics, the protocol and its report."""
