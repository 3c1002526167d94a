"""One process: waiting, watching sockets, open streams, log lines."""
