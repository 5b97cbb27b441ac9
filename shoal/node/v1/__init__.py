"""Version 1: generated from proto/shoal/node/v1."""
