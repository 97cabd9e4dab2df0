"""Output for people: curves, pictures, tables, the live page and pages of stories."""
