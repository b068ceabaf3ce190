"""Write and read an output folder of two files with the same text."""

from phreg_deploy.files.atomic import atomic_folder


def write_output(target, text, force=True, meanwhile=lambda: None):
    with atomic_folder(target, force) as folder:
        (folder / "manifest.json").write_text(text)
        (folder / "other").write_text(text)
        meanwhile()


def read_output(target):
    """Return the text of an output; assert that both of its files have the same text."""
    texts = {p.name: p.read_text() for p in target.iterdir()}
    assert set(texts) == {"manifest.json", "other"}
    assert len(set(texts.values())) == 1
    return texts["other"]
