class ExternalShutdownException(Exception):
    """The context was shut down while a node was spinning."""
