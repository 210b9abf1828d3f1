"""The least that a service behind gunicorn can do: parse the same JSON, and answer."""

from flask import Flask, Response, jsonify, request

app = Flask(__name__)


@app.post("/api/admin/rebind/v1")
def empty() -> Response:
    """Do nothing with the request."""
    request.get_json()
    return jsonify({})
