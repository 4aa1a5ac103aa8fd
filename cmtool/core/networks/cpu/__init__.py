"""Kernels that exist for speed on a CPU; elsewhere PyTorch's own are used."""
