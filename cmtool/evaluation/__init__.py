"""From images to numbers: protocols, features, metrics, references."""
