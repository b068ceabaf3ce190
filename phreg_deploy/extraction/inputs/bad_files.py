"""Files that cannot be read: they are listed and left out, up to a limit."""

from __future__ import annotations

import math
import re

from phreg_deploy.errors import PhregError


def check_max_bad(text: str | None) -> None:
    """Raise ``PhregError`` unless the limit is None, a number of files, or a percentage such as "1%"."""
    if text is None:
        return
    number = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*%", text.strip())
    if not re.fullmatch(r"\d{1,12}", text.strip()) and not (number and float(number[1]) <= 100):
        raise PhregError(f"max-bad: got {text!r}, expected a number of files, such as 20, or a percentage up to 100%.")


class BadFiles:
    """``files``: name of each file that cannot be read -> reason. ``most``: the limit in files; None without one."""

    def __init__(self, limit: str | None, total: int) -> None:
        """``limit``: of ``check_max_bad``. ``total``: the number of images of which a percentage is taken."""
        check_max_bad(limit)
        self.limit, self.files = limit, dict[str, str]()
        self.most: int | None = None
        if limit is not None:
            share = limit.strip().removesuffix("%")
            self.most = int(share) if share == limit.strip() else math.floor(float(share) / 100 * total)

    def add(self, name: str, reason: str) -> None:
        """Note a file that cannot be read."""
        self.files[name] = reason

    @property
    def too_many(self) -> bool:
        """Whether there are more than the limit."""
        return self.most is not None and len(self.files) > self.most

    @property
    def message(self) -> str:
        """What the limit was and which files exceed it."""
        names = list(self.files)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        files = f"{len(names)} file{'s' * (len(names) != 1)}"
        return (
            f"extract: {files} cannot be read, more than --max-bad {self.limit} allows ({self.most}): "
            f"{', '.join(names[:5])}{more}. Fix or remove these files, or raise the limit."
        )
