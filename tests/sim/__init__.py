"""A seeded simulation of one replicated shard. `python -m tests.sim SEED` replays a run."""
