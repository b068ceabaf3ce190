"""Figures of what the tools survive: damaged files, kills, full disks, hostile input, threads and long runs."""
