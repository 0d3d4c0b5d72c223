"""Networks with their schedulers, called to make images: one file a kind of pipeline, and what
makes networks fast."""
