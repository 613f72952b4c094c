"""The entry point of `python -m easylm_mling VERB ...`, the same as `easylm-mling VERB ...`."""

import sys

from easylm_mling.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
