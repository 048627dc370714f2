"""`python -m server.command`: the command `slsnet` where the project is not installed."""

import sys

from server.command import main

sys.exit(main())
