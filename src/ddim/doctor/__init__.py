"""A scheduler configuration in, findings out: the checks, the figures behind them, and the report."""
