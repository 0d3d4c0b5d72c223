"""Networks with their schedulers, called to make images: one file a kind of pipeline."""
