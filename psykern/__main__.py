"""``python -m psykern``: the command line."""

import sys

from psykern.cli import main

sys.exit(main())
