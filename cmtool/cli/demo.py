"""cmtool demo."""


def demo() -> None:
    """Tour."""
