"""``python -m esegeta`` is the command ``esegeta``."""

import os
import sys

if __name__ == "__main__":
    if not sys.flags.safe_path and os.path.realpath(sys.path[0]) != os.path.realpath(f"{__file__}/../.."):
        del sys.path[0]  # Python puts the current folder first: no file in there is to pass for a package

    from esegeta.cli import main

    raise SystemExit(main())
