"""Images to latent codes and back: the encoders, the exactly reversible samplers, and the files of
codes."""
