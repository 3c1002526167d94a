"""This process: waits, watches, sockets, streams to be ended, log lines."""
