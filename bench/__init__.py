"""Benchmarks, one script each; `python -m bench` lists them."""
