"""`python -m packlight.cli`: the command line without its installed script."""

import sys

from packlight.cli import main

sys.exit(main())
