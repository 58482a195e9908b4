"""Entry point of `python -m gn_det`, which is the same as the command `gn-det`."""

from .cli import main

if __name__ == "__main__":
    main()
