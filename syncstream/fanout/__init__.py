"""Connections that no thread and no greenlet serves: the loop."""
