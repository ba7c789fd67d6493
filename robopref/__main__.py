"""`python -m robopref` is the command `robopref`."""

from __future__ import annotations

import sys

from robopref.cli import main

if __name__ == "__main__":
    sys.exit(main())
