"""A site's policy: the Python file that REBIND_POLICY names, which connects handlers to the `rebind` event."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


class PolicyError(Exception):
    """The policy cannot be loaded."""


def load(path: str) -> None:
    """Run the file at `path`, which connects its handlers, and keep it: blinker holds handlers weakly.

    Raises PolicyError, with the file and the reason.
    """
    spec = spec_from_file_location("rebind_policy", Path(path).absolute())
    if spec is None or spec.loader is None:
        raise PolicyError(f"the policy {path} is no Python file (*.py)")
    module = module_from_spec(spec)
    sys.modules["rebind_policy"] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise PolicyError(f"the policy {path} cannot be loaded: {type(error).__name__}: {error}") from error
