"""Weight files, ours and other people's, to and from our networks."""
