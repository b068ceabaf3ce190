"""The verbs of the command line, one file each, and what an interruption of each leaves.

To add a verb: write ``commands/<verb>.py`` with a click command of that name, and add the verb to ``VERBS``. A verb in
another folder of ``cli/`` is in ``FOLDERS`` too.
"""

_NOTHING = "Nothing was written."
_ATOMIC = "OUTPUT is written whole or not at all: if it is missing, nothing of it was kept; run the command again."

# verb: what the message of an interruption says, in the order of the help
VERBS = {
    "distill": "No student was written. Teacher targets stay in the cache. If OUTPUT.partial exists, the same command "
    "with --resume continues from it, and with --force starts over.",
    "export": _ATOMIC,
    "calibrate": _ATOMIC,
    "build": "No half-built engine was kept; run the command again.",
    "check": _NOTHING,
    "explore": _ATOMIC,
    "profile": _NOTHING,
    "extract": "OUTPUT keeps what --shard or --ray finished, and nothing otherwise; run the command again.",
    "watch": _NOTHING,
    "serve": _NOTHING,
    "artifacts": _NOTHING,
    "evaluate": "No report was written. Features that were computed stay in the cache; run the command again.",
    "probe": _ATOMIC,
    "classes": _ATOMIC,
    "attach": _ATOMIC,
    "inspect": _NOTHING,
    "sign": "The signature that was there is kept, or there is none.",
    "verify": _NOTHING,
    "push": "The repository is as it was, or has the whole commit; run the command again.",
    "doctor": _NOTHING,
    "selftest": "The archive holds the checks that were done, if any was.",
    "demo": _ATOMIC,
}

# Verbs that stand in another folder of ``cli/``.
FOLDERS = {
    "attach": "probing",
    "classes": "probing",
    "evaluate": "probing",
    "explore": "exploring",
    "probe": "probing",
    "push": "sharing",
    "serve": "serving",
    "sign": "signing",
    "verify": "signing",
    "selftest": "testing",
    "watch": "streaming",
}
# Verbs that take addresses; all others read files of this machine.
ADDRESSES = ("watch",)
