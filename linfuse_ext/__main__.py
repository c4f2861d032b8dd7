"""`python -m linfuse_ext`: the command line."""

from .cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
