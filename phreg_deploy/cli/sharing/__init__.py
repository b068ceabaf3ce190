"""The command that shares a student or a bundle."""
