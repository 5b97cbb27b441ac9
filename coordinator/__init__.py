"""The public API: parses requests, asks shards, merges and renders answers. Keeps nothing on disk."""
