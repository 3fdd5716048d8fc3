"""``python -m edgeseg`` is the ``edgeseg`` command."""

from edgeseg.cli import main

# Worker processes import this module anew.
if __name__ == "__main__":
    main()
