"""Diagnoses a scheduler configuration: the checks, the figures behind them, and the report."""
