"""Images to latent codes and back: encoders, exactly reversible samplers, and code files."""
