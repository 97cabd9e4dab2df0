"""What is shown to people: curves, pictures, the live page, stories."""
