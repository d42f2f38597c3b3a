"""One run: its story, its session, the training loop and what the loop needs."""
