"""`python -m metaprune` is the command `metaprune`; `torchrun -m metaprune` needs it."""

from metaprune.cli import main

if __name__ == "__main__":
    main()
