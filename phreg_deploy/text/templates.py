"""Templates of sentences about a class, ``{}`` in place of its name."""

from __future__ import annotations

from pathlib import Path

from phreg_deploy.arguments import refuse_url
from phreg_deploy.errors import PhregError

# open_clip's constants: the templates for ImageNet in CLIP's code, and the best seven of them in its notebook.
USUAL = {"80": "OPENAI_IMAGENET_TEMPLATES", "7": "SIMPLE_IMAGENET_TEMPLATES"}
PLACE = "{}"


def read_templates(which: str) -> tuple[str, ...]:
    """Return the templates named "80" or "7", which need open_clip, or those of a file, one a line.

    Raises:
        PhregError: no such file, no template, or one without exactly one ``{}``.
    """
    if which in USUAL:
        import open_clip

        return tuple(template(PLACE) for template in getattr(open_clip, USUAL[which]))
    refuse_url(which)
    path = Path(which)
    if not path.is_file():
        raise PhregError(
            f"templates: got {which!r}, expected {' or '.join(USUAL)}, or a file of sentences, one a line."
        )
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise PhregError(f"templates: {path} cannot be read ({error}); expected one sentence a line.") from None
    found = tuple(line for line in lines if line)
    wrong = next((line for line in found if line.count(PLACE) != 1), None)
    if not found or wrong is not None:
        got = "no sentence" if wrong is None else repr(wrong)
        raise PhregError(f"templates: {path} has {got}, expected sentences with {{}} once, e.g. a photo of a {{}}.")
    return found
