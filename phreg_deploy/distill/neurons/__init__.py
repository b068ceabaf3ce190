"""Register neurons: the units that make outlier tokens. Finds them, and moves them to a register token."""
