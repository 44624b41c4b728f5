"""``python -m foldexport``, the same as the script ``foldexport``."""

from __future__ import annotations

import sys

from foldexport.cli import main

if __name__ == "__main__":
    sys.exit(main())
