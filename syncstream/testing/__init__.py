"""What tests of applications, and of brokers, need."""

from .brokers import check_broker

__all__ = ["check_broker"]
