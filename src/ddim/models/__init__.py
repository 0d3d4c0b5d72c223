"""Finds, reads, converts and writes models on a disk or a hub, and turns pictures into tensors."""
