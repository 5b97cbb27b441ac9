"""The transport between nodes: shoal/storage_api.py over gRPC. Start at client.py and bus.py."""
