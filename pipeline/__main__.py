"""`python -m pipeline`: the command line, for launchers such as torchrun."""

from pipeline.cli import main

main()
