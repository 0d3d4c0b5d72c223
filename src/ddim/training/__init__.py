"""Training a network: its configuration, the loop, checkpoints and the finished model."""
