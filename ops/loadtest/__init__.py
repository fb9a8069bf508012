"""``python -m ops.loadtest URL``: what an endpoint's streams are like under load, seen from outside.

options      the command line as one frozen value; every mistake in one line
quantities   durations and shares as people write them
objectives   ``--slo``: what a request, or the run, has to keep
prompts      what is asked
target       whom: a URL and what stands there, to the bytes of a request
arrivals     when requests begin: ramp, Poisson process, back-off; pure
http1        an HTTP/1.1 response: bytes to head and payload; no I/O
answers      the two event streams, Sluice's and OpenAI's: events to tokens, errors, ends; no I/O
record       one request: its times and its outcome
metrics      definitions and percentiles; no I/O
tally        what a run adds up while it goes on, in bounded memory
client       one request over a socket becomes a record
overhead     what the tester itself costs: its processor time, how late its loop is
run          one load over its ramp, warm-up and window
jsonl        a line of JSON for each request
summary      a run's figures as one value, and as JSON
capacity     the most streams at which the objectives hold
session      one invocation: client, display and log opened, the load put on, Ctrl-C heard
progress     the live display, in a process of its own
terminal     the tables at the end
plots        the figures' plots as SVG
report       the self-contained HTML report
loopback     the endpoint of the self-test: as cheap as can be
selftest     what the tester costs on this machine

It imports nothing of the server but its event-stream parser, which does no I/O.
"""
