"""What is done at a destination, and who is at work on it."""
