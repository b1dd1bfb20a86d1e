"""`python -m ptee`."""

from ptee.cli import main

main()
