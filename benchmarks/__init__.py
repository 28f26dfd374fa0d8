"""The benchmarks; `python -m benchmarks.run` runs them."""
