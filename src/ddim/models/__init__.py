"""Models on a disk or a hub: finding, reading, converting and writing them, and their pictures as tensors."""
