"""``python -m ops.loadtest URL``: what an endpoint's streams are like under load, seen from outside.

options      the command line as one frozen value; every mistake in one line
objectives   ``--slo``: what a request, or the run, has to keep
prompts      what is asked
arrivals     when requests begin: ramp, Poisson process, back-off; pure
http1        an HTTP/1.1 response: bytes to head and payload; no I/O
answers      the two event streams, Sluice's and OpenAI's: events to tokens, errors, ends; no I/O
record       one request: its times and its outcome
metrics      definitions and percentiles; no I/O
tally        what a run adds up while it goes on, in bounded memory
client       one request over a socket becomes a record
overhead     what the tester itself costs: its processor time, how late its loop is
run          one load over its ramp, warm-up and window
summary      a run's figures, for people and as JSON
capacity     the most streams at which the objectives hold
progress     the live display, in a process of its own
plots        the figures' plots as SVG
report       the self-contained HTML report
loopback     the endpoint of the self-test: as cheap as can be
selftest     what the tester costs on this machine

It imports nothing of the server but its event-stream parser, which does no I/O.
"""
