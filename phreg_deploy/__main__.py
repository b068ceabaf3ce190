"""Run the command line; Ctrl-C while it is imported ends in a message, too."""

import sys


def main() -> None:
    try:
        from phreg_deploy.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted: phreg-deploy. Nothing was written.\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
