"""What stands around the server: benchmark, load test, and the files that deploy it."""
