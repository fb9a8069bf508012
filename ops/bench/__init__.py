"""``make bench``: what a relayed token costs, in processor time, memory and delay, measured over loopback.

figures      numbers to figures: percentiles, medians of rounds, the table; no I/O
simulator    the endpoint: an OpenAI-compatible stream at a chosen pace, a process of its own
plain_relay  the peer: the relay that a tutorial would write, measured in the same run
viewers      the browsers: many streams at once, every token checked
procs        processes on cores of their own, and what the kernel says about them
scenarios    what is measured
"""
