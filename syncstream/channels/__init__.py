"""Channels: publish, subscribe, resume."""
