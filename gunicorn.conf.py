"""gunicorn's settings: it finds this file by itself in the folder where it is started."""

bind = "127.0.0.1:8000"
workers = 2
worker_class = "gthread"
threads = 4
accesslog = None  # the application writes one line per request
control_socket_disable = True
