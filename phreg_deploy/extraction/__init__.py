"""Dense features of many images, as files: in one process, or in parts by several processes at once."""
