"""Builds indexes for sealed segments, away from the process that serves."""
