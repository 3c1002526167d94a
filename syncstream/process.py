"""The counters of this process's streams: `stats`."""

from .runtime.process import stats

__all__ = ["stats"]
