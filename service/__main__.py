"""`python -m service`: serves HTTP with the settings of the environment until told to stop."""

import sys

from service.errors import InvalidInputError, MissingDependencyError
from service.settings import read_settings
from service.threads import binding_workers

_USAGE_ERROR = 2


def main() -> int:
    """Reads the settings and serves; a wrong setting is one line and exit status 2."""
    try:
        settings = read_settings()
        with binding_workers(settings.torch_threads):  # before anything imports torch
            from service.server import serve
        return serve(settings)
    except (InvalidInputError, MissingDependencyError) as error:
        print(f"error: {error.detail}", file=sys.stderr)
        return _USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
