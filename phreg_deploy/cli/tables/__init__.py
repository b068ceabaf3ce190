"""Rows of the tables that commands print, one file per command."""
