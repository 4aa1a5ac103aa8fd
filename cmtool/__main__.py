"""`python -m cmtool`, and so `torchrun -m cmtool`."""

from cmtool.cli import main

if __name__ == "__main__":
    main()
