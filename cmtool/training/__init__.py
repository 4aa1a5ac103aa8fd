"""One training run: how it starts, its steps, its folder, its log and its report."""
