"""python -m tersor"""

import sys

from tersor.cli import main

sys.exit(main())
