"""Watches over shards and disks. `health` decides and is pure; `service` looks and keeps time."""
