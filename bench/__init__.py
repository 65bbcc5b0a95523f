"""Benchmarks of tritonbn: `python -m bench --help` lists them."""
