"""The machine: devices, processes, workers, files. Nothing here knows a model."""
