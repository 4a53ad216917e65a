"""`python -m sstoken.pipeline`: the command line, for launchers such as torchrun."""

from sstoken.pipeline.cli import main

main()
