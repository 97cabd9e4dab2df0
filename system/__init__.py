"""The machine: files, worker processes, devices, and the network."""
