"""What only a real card can tell: `python -m tests.gpu.check --out FILE`. See `__main__`."""
