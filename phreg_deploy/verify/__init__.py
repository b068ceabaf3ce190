"""A bundle or a model, and images -> a report. Joins rooms that must not know each other: the exporter cannot mark its own homework."""
