"""Tools for tests of applications and brokers."""

from .brokers import check_broker

__all__ = ["check_broker"]
