"""Sources that are made of other sources.

`retrying` begins a source that has failed again, after its last event. `batched` joins
events to lists. Both take plain and asynchronous sources, and close what they read
exactly once.
"""

from .batches import batched
from .retries import retrying

__all__ = ["batched", "retrying"]
