"""`python -m qgraph` is the `qgraph` command."""

from qgraph.cli import main

if __name__ == "__main__":
    main(prog_name="qgraph")
