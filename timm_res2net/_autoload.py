"""Registers the family as soon as timm is imported. `timm-res2net autoload --on` makes Python run this at startup.

Until then it imports only sys, so Python starts as fast as without it.
"""

# Type annotations are left out: they would import typing.
# mypy: ignore-errors

import sys


class RegisterAfterTimm:
    """Import hook that finds timm through the other finders, and imports timm_res2net right after it."""

    def find_spec(self, name, path=None, target=None):
        """Returns the spec of timm, with a loader that also registers the family; None for any other module."""
        if name != 'timm':
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, 'find_spec'))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is None or not hasattr(spec.loader, 'exec_module'):
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            try:
                import timm_res2net  # noqa: F401
            except Exception as error:
                print(f'timm_res2net could not register its models: {error}', file=sys.stderr)

        spec.loader.exec_module = execute_and_register
        return spec


# Python reads the .pth files of a virtual environment twice, and two finders would call each other forever.
if not any(type(finder).__name__ == 'RegisterAfterTimm' for finder in sys.meta_path):
    sys.meta_path.insert(0, RegisterAfterTimm())
