"""One file per command, named after it. Each parses, calls one library function and prints."""
