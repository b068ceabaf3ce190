"""Check for the modules that ``exporter`` imports, and name all that are missing. ``exporter`` imports this first."""

from phreg_deploy.extras import EXPORT, require

require("phreg_deploy.export", export=EXPORT)

import phreg_deploy.models  # noqa: E402, F401  (explains a torch that is installed and broken)
