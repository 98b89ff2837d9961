"""Phases of a training: the schedule, and what moves a model from one phase to the next."""
