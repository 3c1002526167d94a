"""One process: waiting, watching sockets, signals, open streams, log lines."""
