"""From a path to a microbatch: data sets, their sources, labels and images."""
