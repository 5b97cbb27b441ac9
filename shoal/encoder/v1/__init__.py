"""Version 1: generated from proto/shoal/encoder/v1."""
