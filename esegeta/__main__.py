"""``python -m esegeta`` is the command ``esegeta``."""

from esegeta.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
