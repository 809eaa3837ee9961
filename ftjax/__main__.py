"""`python -m ftjax` is `ftjax`."""

import os
import sys

# Python puts the current folder first on the path, where a user's numbers.py or datasets.py would hide the module of
# that name. The folder stays where this very ftjax is run from it.
if not sys.flags.safe_path and sys.path[0] != os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
    del sys.path[0]

from ftjax.cli import main  # noqa: E402

sys.exit(main())
