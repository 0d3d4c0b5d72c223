"""Denoising diffusion implicit models."""

__version__ = "0.1.0"
