"""Generated from proto/shoal/v1: the messages of the public gRPC API."""
