"""`python -m ptee`."""

from ptee.cli.main import main

main()
