"""The commands of `timm-res2net`, one per file: `add_arguments`, `run`, and a docstring that `--help` shows."""
