"""Command lines for tables of mistakes, and the check that a mistake is a message and writes nothing."""

from tests.cli_helpers import leftovers


def distill(w, model, *more):
    return ["distill", model, "--images", w.photos, "-o", w.out, *more]


def export(w, model, *more):
    return ["export", model, "-o", w.out, *more]


def artifacts(w, model, *more):
    return ["artifacts", model, "--images", w.photos, *more]


def assert_mistake(world, run_cli, arguments, fragments):
    """Run ``arguments(world)``; assert exit code 2, a message with all ``fragments``, and that nothing was written."""
    run_cli(*arguments(world), "--json").refused(2, *fragments)
    assert not world.out.exists()
    assert leftovers(world.tmp) == []
