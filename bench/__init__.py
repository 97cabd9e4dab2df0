"""Benchmarks, a script each; `python -m bench` lists them."""
