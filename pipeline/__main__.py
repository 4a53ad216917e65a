"""`python -m sstoken.pipeline`: the command line, for when the console script is not on the path."""

from sstoken.pipeline.cli import main

if __name__ == "__main__":
    main()
