"""Training a program: the step, the trainer, schedules and penalties, resuming, many GPUs."""
