"""The loop that serves connections without a thread or greenlet each."""
