"""Find out what this machine can run, and what to type for what is missing."""
