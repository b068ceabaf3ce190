"""This machine -> what it can run, and what to type for each part that is missing."""
