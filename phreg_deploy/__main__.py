"""Run the command line. Ctrl-C ends it in a message, also while it is imported; so does SIGTERM from then on."""

import sys


def main() -> None:
    try:
        from phreg_deploy.cli import main as run
        from phreg_deploy.cli.termination import catch_termination

        catch_termination()
        run()
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted: phreg-deploy. Nothing was written.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
