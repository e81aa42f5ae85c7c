"""The commands of the command line, a file each: `add_arguments`, `run`, and a docstring that its help shows."""
