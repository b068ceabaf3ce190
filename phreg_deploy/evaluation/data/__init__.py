"""Images, their truth, their split and their features."""
