"""``python -m bimamba_lit``: the same program as ``bimamba``."""

from bimamba_lit.cli import main

if __name__ == "__main__":
    main()
