"""What is trained: iterated, grouped, counted, and as a table."""
