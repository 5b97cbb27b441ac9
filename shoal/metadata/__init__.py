"""The metadata store: its contract, its implementations and the records that Shoal keeps in it."""
