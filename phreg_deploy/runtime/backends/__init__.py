"""One module per backend, all behind ``interface.Backend``; ``registry`` opens them by name."""
