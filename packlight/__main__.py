"""`python -m packlight`, as in `torchrun -m packlight train FILE`: the command line."""

import sys

from packlight.cli import main

sys.exit(main())
