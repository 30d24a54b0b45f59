"""`python -m locate_edit` is the command line."""

from __future__ import annotations

from locate_edit.cli import main

if __name__ == "__main__":
    main()
