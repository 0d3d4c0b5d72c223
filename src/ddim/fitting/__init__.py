"""Timesteps fitted to one model, so that few evaluations come close to many."""
