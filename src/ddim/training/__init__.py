"""Training: configuration, data, exponential moving average, and the loop."""
