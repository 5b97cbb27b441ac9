"""Generated from proto/shoal/wire: the format of point batches and log entries."""
