"""Presets: TOML files, validated into frozen models, and from these to objects of the engine."""
