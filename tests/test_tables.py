"""Tables of the command line: text that looks like markup, and the digits of figures."""

from phreg_deploy.cli.console import Result, figure


def test_tables_print_brackets_as_they_are(capsys):
    """rich reads [words] as markup by default; the command that installs an extra contains such words."""
    Result(as_json=False, quiet=False).table("t", ["what to do"], [['pip install "phreg-deploy[cpu]"']])
    assert 'pip install "phreg-deploy[cpu]"' in capsys.readouterr().out


def test_figures_keep_the_digits_that_matter():
    assert figure(0.99999912) == "0.999999"
    assert figure(31.6183) == "31.62"
    assert figure(1e-7) == "1e-07"
    assert figure(None) == "-"
