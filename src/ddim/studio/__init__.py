"""The web page for a person who would rather look: it asks for the same runs as the commands."""
