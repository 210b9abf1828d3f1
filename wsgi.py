"""The service for a WSGI server: `gunicorn wsgi:app`, and for the command line and the dev server: `flask …`."""

import sys

import click

from access import AccessError
from app import SettingError, create_app
from event import PolicyError
from rebinding import printable
from store import StoreUnusable

try:
    app = create_app()
except (SettingError, StoreUnusable, PolicyError, AccessError) as error:
    print(printable(f"rebind cannot start: {getattr(error, 'in_full', error)}"), file=sys.stderr)
    # gunicorn's APP_LOAD_ERROR: it stops, where after any other exit it would start the worker again, for ever.
    sys.exit(1 if click.get_current_context(silent=True) else 4)
