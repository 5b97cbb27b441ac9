"""Turns texts into vectors: batching, the model, and the service around both."""
