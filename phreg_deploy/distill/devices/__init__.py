"""Share a distillation's work over several devices of one process, or over several processes."""
