"""`python -m cmtool`, and so `torchrun -m cmtool`."""

from cmtool.cli import entry

if __name__ == "__main__":
    entry()
