"""The fixtures that an environment without torch cannot make; `tests/torch_free.py` runs this file to make them."""

import pytest


@pytest.mark.parametrize("name", ["base", "student", "bundle", "wide_bundle", "int8_bundle", "wide_int8_bundle"])
def test_the_fixture_is_made(request, name):
    folder = request.getfixturevalue(name)
    assert (folder / "config.json").is_file() or (folder / "manifest.json").is_file()
