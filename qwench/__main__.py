"""`python -m qwench` is `qwench`."""

from qwench.cli import main

if __name__ == "__main__":
    main()
