"""One script per claim of the README. `python -m benchmarks` runs all, with NAME only that one."""
