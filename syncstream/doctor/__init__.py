"""``python -m syncstream doctor``: why does a stream not arrive as one?

Rule: what was seen, what it means and what is said of it stay apart.

===============  ==============================================================
``observation``  what was seen: values, and how they are shown
``request``      what is asked: the address, the headers, the body
``connect``      DNS, TCP and TLS, before a deadline
``response``     the head and the body's bytes, read by http.client under a tap
``body``         the body's bytes as events, comments and NDJSON values
``listen``       the network's side: `examine` returns an `Observation`
``cures``        what to do about a status, a proxy, a time-out
``checks``       what it means: `judge`, a pure function to findings
``report``       what is said: a pure function of both to text
===============  ==============================================================

Whatever comes from outside is escaped where it is shown, and bounded where it is
kept; each wait ends at a deadline.
"""
