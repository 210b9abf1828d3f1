"""The service for a WSGI server, `gunicorn wsgi:app`, and for `flask …`. As a program it is our commands alone."""

import sys

import click
from flask import Flask
from flask.cli import FlaskGroup

from app import create_app
from rebinding import printable
from schemas import SettingError
from store import StoreUnusable


def created() -> Flask:
    """The application. If there can be none, the process ends, and one line says why."""
    try:
        return create_app()
    except (SettingError, StoreUnusable) as error:
        print(printable(f"rebind cannot start: {getattr(error, 'in_full', error)}"), file=sys.stderr)
        # gunicorn's APP_LOAD_ERROR: it stops, where after any other exit it would start the worker again, for ever.
        sys.exit(1 if click.get_current_context(silent=True) else 4)


if __name__ == "__main__":
    FlaskGroup(create_app=created, add_default_commands=False, add_version_option=False).main(prog_name="rebind")
else:
    app = created()
