"""The library on torch's own database of operators; `python -m conformance.run`."""
