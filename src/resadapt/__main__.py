"""The command line as ``python -m resadapt``."""

import sys

from resadapt.cli.main import main

sys.exit(main())
