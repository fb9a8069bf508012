"""``make bench``: what a relayed token costs, in processor time, memory and delay, measured over loopback.

figures      numbers to figures: percentiles, medians of rounds, ratios, the table; no I/O
tokens       a token's text, and whether a stream's tokens all came to their place; no I/O
goals        what is to be reached, and whether it was; no I/O
simulator    the endpoint: an OpenAI-compatible stream at a chosen pace, a process of its own
ticker       its clock
viewers      the browsers: many streams at once, every token checked
procs        processes on cores of their own, and what the kernel says about them
relays       who is measured: Sluice, the peers, nobody
peers        nginx, and the FastAPI stack in a venv of its own
plain_relay  the relay that a tutorial would write with aiohttp
rig          one relay and one endpoint, and whether their figures can be trusted
scenarios    what is measured
curves       how the cost grows with the work, a command of its own
plots        the curves as SVG
"""
