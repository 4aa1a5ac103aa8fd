"""The engine: networks, solvers, losses, samplers and edits around one callable, the Denoiser."""
