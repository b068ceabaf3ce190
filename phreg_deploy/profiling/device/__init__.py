"""What a GPU can do, draws and is held back by."""
