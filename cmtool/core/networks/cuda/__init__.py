"""Kernels that exist for speed on a GPU of NVIDIA's; elsewhere PyTorch's own are used."""
