"""Shards on disk: log, segments, filters, search. See storage_node/node.py first."""
