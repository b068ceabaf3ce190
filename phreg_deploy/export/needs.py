"""Imported before what an exporter needs, to name all of it that is not there."""

from phreg_deploy.extras import EXPORT, require

require("phreg_deploy.export", export=EXPORT)

import phreg_deploy.models  # noqa: E402, F401  (says what is wrong where torch is there and broken)
