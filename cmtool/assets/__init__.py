"""Bundled files; PROVENANCE.md says where each comes from."""
