"""A bundle -> latency, throughput, memory and energy on this machine."""
