"""The command ``vistower``, also ``python -m vistower``."""

from vistower.interrupts import stoppable


def main() -> None:
    """Run the command line; it may be stopped while its imports still run."""
    with stoppable():
        from vistower.cli import main as command_line

        command_line()


if __name__ == "__main__":
    main()
