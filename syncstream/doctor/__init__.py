"""``python -m syncstream doctor``: diagnose a stream from the client's side.

Rule: the observation, its meaning and its report are separate.

===============  ==============================================================
``observation``  everything seen of a stream: values, and how they are shown
``request``      the URL, the headers and the body to send
``connect``      DNS, TCP and TLS, before a deadline
``response``     the head and the body's bytes, read by http.client under a tap
``body``         the body's bytes as events, comments and NDJSON values
``listen``       the network's side: `examine` returns an `Observation`
``cures``        advice for a status, a proxy or a timeout
``checks``       `judge`, a pure function from an observation to findings
``timing``       the checks of when bytes and events came: buffering, silence
``report``       a pure function from both to text
===============  ==============================================================

Bytes from outside are escaped where they are shown and bounded where they are kept.
Each wait ends at a deadline.
"""
