"""The processes of a cluster, one module each: every process loads only what it needs."""
