"""The machine: files, worker processes, devices, and what leaves it."""
