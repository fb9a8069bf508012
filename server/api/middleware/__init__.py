"""What stands around every request, outermost first: the order is in server/app.py."""
