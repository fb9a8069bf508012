"""Other people's clients, unchanged, against the real server: what we promise them is that nothing surprises them."""
